"""Training items by position in the run: an image with the timestep and the noise of that position."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdtune.config.sections import Denoising
from sdtune.data import Sample, Stream
from sdtune.run import rng

HOLDOUT_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Quantiles of the training distribution of timesteps at which the loss of held-out images is measured."""

Position = int | tuple[str, int]
"""A position in the run, or ``("holdout", k)``: the k-th pair of held-out image and quantile."""


class DenoisingDataset(Dataset[dict[str, Any]]):
    """The item at a ``Position``. A subclass implements ``make_item``.

    Options of the section Denoising, if the config of ``stream`` has it, change the noise.
    """

    def __init__(self, stream: Stream):
        self.stream, self.seed = stream, stream.seed
        self.options = stream.cfg if isinstance(stream.cfg, Denoising) else None

    def __getitem__(self, position: Position) -> dict[str, Any]:
        if isinstance(position, int):
            return self.make_item(self.stream[position], self.draw_timestep(position), position)
        image, quantile = divmod(position[1], len(HOLDOUT_QUANTILES))
        u = torch.tensor(HOLDOUT_QUANTILES[quantile], dtype=torch.float64)
        return self.make_item(self.stream.holdout[image], u, position)

    @property
    def reads_images(self) -> bool:
        """Whether an image has to be decoded for an item."""
        return True

    @property
    def holdout(self) -> list[tuple[str, int]]:
        return [("holdout", k) for k in range(len(self.stream.holdout) * len(HOLDOUT_QUANTILES))]

    @property
    def prompts(self) -> Sequence[Any]:
        """What the sample grids show."""
        raise NotImplementedError

    def scored_prompts(self, count: int) -> Sequence[Any]:
        """What the scores of the run show, of which there are ``count``: prompts k, k + n, ... are alike."""
        return self.prompts

    def make_item(self, sample: Sample, u: Tensor, position: Position) -> dict[str, Any]:
        """Tensors by name, and the ``name`` of the image.

        Args:
            u: uniform in [0, 1), float64 scalar, which chooses the timestep.
        """
        raise NotImplementedError

    def draw_timestep(self, position: int) -> Tensor:
        """Uniform in [0, 1), float64; stratified, in a part of [0, 1) that no other image of the step has.

        Each image is still uniform over all steps, and the mean over a step varies less.
        """
        u = torch.rand((), generator=rng.generator(self.seed, "timestep", position), dtype=torch.float64)
        if self.options is None or not self.options.stratified_timesteps:
            return u
        step, place = divmod(position, self.stream.group)
        parts = torch.randperm(self.stream.group, generator=rng.generator(self.seed, "timestep parts", step))
        return (parts[place] + u) / self.stream.group

    def draw_normal(self, purpose: str, position: Position, *size: int) -> Tensor:
        return torch.randn(size, generator=rng.generator(self.seed, purpose, position))

    def draw_uniform(self, purpose: str, position: Position) -> Tensor:
        """In [0, 1), float64."""
        return torch.rand((), generator=rng.generator(self.seed, purpose, position), dtype=torch.float64)

    def draw_noise(self, position: Position, *shape: int) -> dict[str, Tensor]:
        """``noise`` ``[C, H, W]``; with input perturbation also ``input_noise``, from which x_t is made."""
        noise = self.draw_normal("noise", position, *shape)
        if self.options is None:
            return {"noise": noise}
        if self.options.noise_offset:
            noise += self.options.noise_offset * self.draw_normal("noise offset", position, shape[0], 1, 1)
        if not self.options.input_perturbation:
            return {"noise": noise}
        extra = self.draw_normal("input perturbation", position, *shape)
        return {"noise": noise, "input_noise": noise + self.options.input_perturbation * extra}
