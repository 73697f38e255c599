"""Inpainting models of SDXL."""

from typing import Any, ClassVar

from diffusers import StableDiffusionXLInpaintPipeline

from sdtune.models.families.inpainting import Inpaints
from sdtune.models.families.stable_diffusion_xl import StableDiffusionXL


class StableDiffusionXLInpainting(Inpaints, StableDiffusionXL):
    pipeline_class: ClassVar[Any] = StableDiffusionXLInpaintPipeline
    reads_windows: ClassVar[bool] = False
