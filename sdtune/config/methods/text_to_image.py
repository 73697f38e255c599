"""Options of `sdtune text-to-image`."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import model_validator

from sdtune.config.section_base import NonNegative, Positive, aliases, requires
from sdtune.config.sections import (
    BaseOptions,
    Captions,
    Data,
    Denoising,
    Hub,
    Latents,
    Masks,
    Model,
    Optim,
    Preview,
    Prompts,
    Run,
    Streaming,
)


class TextToImageConfig(
    Denoising, BaseOptions, Model, Captions, Masks, Latents, Streaming, Data, Optim, Prompts, Preview, Hub, Run
):
    """Full fine-tuning of a text-to-image model's denoiser (Rombach et al. 2022)."""

    method: ClassVar[str] = "text-to-image"
    entry: ClassVar[str] = "sdtune.recipes.text_to_image:TextToImage"
    examples: ClassVar[str] = r"""
    sdtune text-to-image --dataset tiny-hearts --steps 20
    sdtune text-to-image --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset photos --use-ema --gradient-checkpointing --mixed-precision bf16
    sdtune text-to-image --dataset photos --accelerate-config fsdp2
    """

    output_dir: Path = Path("runs/text-to-image")
    learning_rate: Positive = 1e-5
    dream: Annotated[bool, aliases("dream_training")] = False
    """Let the noise hold some of the network's own error, at a second forward pass (DREAM; Zhou et al. 2023)."""
    dream_detail_preservation: Annotated[NonNegative, requires("dream")] = 1.0
    """Power p of DREAM; more keeps closer to the ordinary loss."""

    @model_validator(mode="after")
    def _one_noise(self) -> Self:
        if self.dream and self.input_perturbation:
            raise ValueError("dream and input_perturbation both change the noise of the input: give one")
        return self
