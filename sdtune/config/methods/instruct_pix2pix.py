"""Options of `sdtune instruct-pix2pix`."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from annotated_types import Ge, Interval
from pydantic import model_validator

from sdtune.config.methods.control import PlainCaptions
from sdtune.config.scores import Agreement
from sdtune.config.section_base import Count, NonNegative, aliases
from sdtune.config.sections import (
    Captions,
    Data,
    Denoising,
    EditCaptions,
    Hub,
    Latents,
    Masks,
    Model,
    Optim,
    Preview,
    Prompts,
    Run,
    Streaming,
    ValidationImages,
)


class InstructPix2PixConfig(
    EditCaptions,
    ValidationImages,
    Denoising,
    PlainCaptions,
    Model,
    Captions,
    Masks,
    Streaming,
    Latents,
    Data,
    Optim,
    Prompts,
    Preview,
    Hub,
    Run,
):
    """Edit an image as an instruction says (InstructPix2Pix; Brooks et al. 2023)."""

    method: ClassVar[str] = "instruct-pix2pix"
    entry: ClassVar[str] = "sdtune.recipes.instruct_pix2pix:InstructPix2Pix"
    examples: ClassVar[str] = r"""
    sdtune instruct-pix2pix --dataset tiny-edits --resolution 64 --steps 20
    sdtune instruct-pix2pix --dataset fusing/instructpix2pix-1000-samples --use-ema \
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed-precision bf16
    sdtune sample --model runs/instruct-pix2pix --image photo.png --prompt "make it snow"
    """

    original_image_column: str = "input_image"
    """Column that holds the image before the edit; in a folder, input_image_file_name of its metadata."""
    image_column: Annotated[str, aliases("edited_image_column")] = "edited_image"
    """Column that holds the image after the edit; in a folder, edited_image_file_name or file_name."""
    caption_column: Annotated[str | None, aliases("edit_prompt_column")] = None
    """Column that holds the instruction. Default: `text`, or the only other column."""
    conditioning_dropout: Annotated[float, Interval(ge=0, le=1 / 3), aliases("conditioning_dropout_prob")] = 0.05
    """Share p: of each 1, p lose the instruction, p lose the image and p lose both, which guidance needs."""
    validation_image_guidance_scale: NonNegative = 1.5
    """How closely the samples keep to their image; below 1 there is no guidance."""
    resolution: Annotated[int, Ge(8)] = 256
    train_batch_size: Count = 16
    output_dir: Path = Path("runs/instruct-pix2pix")

    @model_validator(mode="after")
    def _two_images(self) -> Self:
        if self.original_image_column == self.image_column:
            raise ValueError(f"original_image_column and image_column are both {self.image_column}: name two columns")
        return self

    @property
    def agreement(self) -> Agreement | None:
        return "edit" if self.original_caption_column else None

    @property
    def passes_per_step(self) -> int:
        guided = self.validation_guidance_scale > 1 and self.validation_image_guidance_scale >= 1
        return 3 if guided else 1
