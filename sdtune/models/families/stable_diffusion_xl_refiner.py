"""SDXL's refiner (Podell et al. 2023, section 2.5): its second text encoder alone, and an aesthetic score.

Published as an image-to-image pipeline. Its samples here start from noise, as those of other bases.
"""

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from sdtune.models.families.stable_diffusion_xl import StableDiffusionXL

SCORE = 6.0
"""Aesthetic score of a picture: what the stock call is told of one that is wanted."""


class StableDiffusionXLRefiner(StableDiffusionXL):
    pipeline_class: ClassVar[Any] = StableDiffusionXLImg2ImgPipeline
    optional_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    reads_windows: ClassVar[bool] = False
    control_pipelines: ClassVar[dict[str, Any]] = {}
    edit_pipeline: ClassVar[Any] = None

    def time_ids(self, size: Tensor) -> Tensor:
        """Sizes of image and crop, and the score in the place of the target's."""
        if not self.index.get("requires_aesthetics_score"):
            return size
        return torch.cat([size[:, :4], size.new_full((len(size), 1), SCORE)], dim=1)

    @classmethod
    def picture_size(cls, pipe: Any, width: int | None, height: int | None) -> dict[str, Any]:
        """Latents that show nothing, and all of the noise on them."""
        scale, side = pipe.vae_scale_factor, pipe.unet.config.sample_size
        sides = (height // scale, width // scale) if width and height else (side, side)
        return {"image": torch.zeros(1, pipe.vae.config.latent_channels, *sides), "strength": 1.0}
