"""Inpainting models of Stable Diffusion 1 and 2."""

from typing import Any, ClassVar

from diffusers import StableDiffusionInpaintPipeline

from sdtune.models.families.inpainting import Inpaints
from sdtune.models.families.stable_diffusion import StableDiffusion


class StableDiffusionInpainting(Inpaints, StableDiffusion):
    pipeline_class: ClassVar[Any] = StableDiffusionInpaintPipeline
    reads_windows: ClassVar[bool] = False
