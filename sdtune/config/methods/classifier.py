"""Options of `sdtune classifier`."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from annotated_types import Ge
from pydantic import model_validator

from sdtune.config.section_base import Count, Counts, Natural, NonNegative, Positive
from sdtune.config.sections import (
    Classes,
    Hub,
    ImageSize,
    LrSchedule,
    Network,
    Optim,
    Run,
    Schedule,
)


class ClassifierConfig(Network, Schedule, Classes, ImageSize, Optim, Hub, Run):
    """A classifier of noised images, which guides a diffusion model (Dhariwal & Nichol 2021)."""

    method: ClassVar[str] = "classifier"
    entry: ClassVar[str] = "sdtune.recipes.classifier:Classifier"
    examples: ClassVar[str] = r"""
    sdtune classifier --dataset photos --class-column folder
    sdtune classifier --dataset photos --class-column folder --resolution 32 \
        --num-holdout-images 500
    sdtune classifier --dataset photos --class-column label --mixed-precision bf16
    """
    num_validation_images: ClassVar[int] = 0
    """It draws none."""
    evaluate_steps: ClassVar[int] = 0
    keep_best: ClassVar[None] = None
    patience: ClassVar[int] = 0

    output_dir: Path = Path("runs/classifier")
    class_column: str
    validation_steps: Natural = 200
    """Steps between measurements on held-out images. 0 measures only at the start and at the end."""
    rescale_betas_zero_snr: bool = False
    """The schedule ends in pure noise (Lin et al. 2023), as that of the model which is to be guided."""

    resolution: Annotated[int, Ge(8)] = 64
    block_out_channels: Counts = [128, 128, 256, 256]
    attention_resolutions: Counts = [32, 16, 8]
    attention_head_dim: Count | None = 64
    train_batch_size: Count = 64
    learning_rate: Positive = 3e-4
    lr_scheduler: LrSchedule = "linear"
    adam_weight_decay: NonNegative = 0.05

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.buckets:
            raise ValueError("buckets: a classifier sees one shape; leave it out")
        return self
