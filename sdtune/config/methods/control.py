"""Options of the image that a control network follows, and of captions beside images, which methods share."""

from typing import Annotated, Literal, Self

from pydantic import model_validator

from sdtune.config.scores import Agreement
from sdtune.config.section_base import requires
from sdtune.config.sections import BaseOptions, ValidationImages


class PlainCaptions(BaseOptions):
    """Captions are read as stock pipelines read prompts."""

    @model_validator(mode="after")
    def _one_window(self) -> Self:
        for name in ("long_prompts", "prompt_weights"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is not for this method: its captions are read as stock pipelines read prompts"
                )
        return self


class Conditioning(ValidationImages):
    """The image that is followed."""

    conditioning_image_column: str = "conditioning_image"
    """Column that holds the image to follow; in a folder, conditioning_image_file_name of its metadata."""
    condition: Literal["edges", "blur", "grey", "mask"] | None = None
    """Make the image to follow from the picture: its edges, or blurred, in grey, in part. Default: read the column."""
    evaluate_condition: Annotated[Literal["edges"] | None, requires("evaluate_steps")] = None
    """What the images to follow show, to score agreement with them. Leave out for edges where condition makes them."""

    @property
    def agreement(self) -> Agreement | None:
        return "edges" if "edges" in (self.condition, self.evaluate_condition) else None

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if self.condition and self.conditioning_image_column != "conditioning_image":
            raise ValueError("condition makes the image that conditioning_image_column would read: give one of them")
        if self.evaluate_condition and self.condition not in (None, self.evaluate_condition):
            raise ValueError(f"evaluate_condition {self.evaluate_condition}: condition makes {self.condition} instead")
        return self
