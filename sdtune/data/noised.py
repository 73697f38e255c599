"""Images by position in the run, each with the timestep and the noise that belong to that position."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdtune.config.sections import Denoising
from sdtune.data import Sample, Stream
from sdtune.run import rng

HOLDOUT_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the training distribution of timesteps the held-out images are measured."""


class Noised(Dataset):
    """What a position shows, or ``("holdout", k)``: the k-th pair of held-out image and quantile.

    Args:
        cfg: a config with the section Data, whose options of Denoising, if it has them, shape the noise.
    """

    def __init__(self, cfg: Any, stream: Stream):
        self.cfg, self.stream = cfg, stream

    def __getitem__(self, position: Any) -> dict[str, Any]:
        if isinstance(position, int):
            u = torch.rand((), generator=rng.generator(self.cfg.seed, "timestep", position), dtype=torch.float64)
            return self.tensors(self.stream[position], u, position)
        image, quantile = divmod(position[1], len(HOLDOUT_QUANTILES))
        u = torch.tensor(HOLDOUT_QUANTILES[quantile], dtype=torch.float64)
        return self.tensors(self.stream.holdout[image], u, position)

    @property
    def holdout(self) -> list[tuple[str, int]]:
        return [("holdout", k) for k in range(len(self.stream.holdout) * len(HOLDOUT_QUANTILES))]

    def tensors(self, sample: Sample, u: Tensor, position: Any) -> dict[str, Any]:
        """A dict of tensors and a ``name``."""
        raise NotImplementedError

    def normal(self, purpose: str, position: Any, *size: int) -> Tensor:
        return torch.randn(size, generator=rng.generator(self.cfg.seed, purpose, position))

    def noise(self, position: Any, *shape: int) -> dict[str, Tensor]:
        """``noise`` ``[C, H, W]``, and under input perturbation the ``input_noise`` that x_t gets in its place."""
        noise = self.normal("noise", position, *shape)
        if not isinstance(self.cfg, Denoising):
            return {"noise": noise}
        if self.cfg.noise_offset:
            noise += self.cfg.noise_offset * self.normal("noise offset", position, shape[0], 1, 1)
        if not self.cfg.input_perturbation:
            return {"noise": noise}
        extra = self.normal("input perturbation", position, *shape)
        return {"noise": noise, "input_noise": noise + self.cfg.input_perturbation * extra}
