"""Stable Diffusion's x4 upscaler (Rombach et al. 2022, section 4.4): the UNet is told a small picture beside the text.

The small picture has a pixel for each place of a latent, and joins it in three further channels. It is noised first,
to a level that the UNet is told as a class (conditioning augmentation; Ho et al. 2021, section 4).
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionUpscalePipeline
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.diffusion.objective import DDPM
from sdtune.models.families.stable_diffusion import StableDiffusion

SCALING = 0.08333
"""What the stock pipeline scales latents by, whatever the configuration of the VAE says."""


class StableDiffusionUpscale(StableDiffusion):
    pipeline_class: ClassVar[Any] = StableDiffusionUpscalePipeline
    control_pipelines: ClassVar[dict[str, Any]] = {}
    edit_pipeline: ClassVar[Any] = None
    enlarges: ClassVar[bool] = True
    reads_text_by_cross_attention: ClassVar[bool] = False  # its layers `attn1` read the text too

    def check(self) -> None:
        super().check()
        levels = min(len(self.low_res_noise.alphas_cumprod), self.denoiser.config.get("num_class_embeds") or 0)
        if not (isinstance(self.most_noise, int) and 0 <= self.most_noise < levels):
            raise UserError(
                f"--model {self.cfg.model}: its max_noise_level is {self.most_noise!r}; UNet or scheduler has {levels}"
            )

    @property
    def most_noise(self) -> Any:
        """The highest level of noise; where the base does not say one, that of the stock pipeline."""
        return self.index.get("max_noise_level", 350)

    @property
    def input_channels(self) -> int:
        """The noised latent, and the small picture."""
        return self.latent_channels + 3

    @property
    def size_multiple(self) -> int:
        """The stock call takes small pictures whose sides are multiples of the downscale themselves."""
        return self.downscale**2

    def normalise(self, z: Tensor) -> Tensor:
        return z * SCALING

    @cached_property
    def low_res_scheduler(self) -> Any:
        return self._read(self.part_class("low_res_scheduler"), "low_res_scheduler")

    @cached_property
    def low_res_noise(self) -> DDPM:
        """The forward process of the small picture."""
        return DDPM(self.low_res_scheduler.alphas_cumprod)

    def conditioning(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """With ``small`` ``[B, 3, h, w]``, noised, and its ``level`` int64 ``[B]``, 0 to ``max_noise_level``.

        Args:
            batch: has ``small`` as it is, ``small_noise`` like it, and ``small_u`` ``[B]``, uniform in [0, 1).
        """
        level = (batch["small_u"] * (self.most_noise + 1)).long()
        small = self.low_res_noise.noise(batch["small"], batch["small_noise"], level)
        return super().conditioning(batch) | {"small": small, "level": level}

    def inputs(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        told = super().inputs(torch.cat([x_t, cond["small"].to(x_t)], 1), t, cond)
        return told | {"class_labels": cond["level"]}

    def pipeline(self, kind: Any = None, **instead: Any) -> Any:
        return super().pipeline(kind, **{"low_res_scheduler": self.low_res_scheduler} | instead)
