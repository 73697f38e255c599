"""FLUX.1 Kontext (2025) trained on pictures and captions as FLUX.1 dev is, without pictures to edit."""

from typing import Any, ClassVar

from diffusers import FluxKontextPipeline

from sdtune.models.families.flux import Flux


class FluxKontext(Flux):
    pipeline_class: ClassVar[Any] = FluxKontextPipeline
    control_pipelines: ClassVar[dict[str, Any]] = {}

    @classmethod
    def picture_size(cls, pipe: Any, width: int | None, height: int | None) -> dict[str, Any]:
        """The stock call enlarges a picture to the area that its authors trained with, if it is not told another."""
        area = {"max_area": width * height} if width and height else {}
        return super().picture_size(pipe, width, height) | area
