"""Options of `sdtune progressive`."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Self

from annotated_types import Ge
from pydantic import Field, model_validator

from sdtune.config.section_base import Count, Counts, Description, NonNegative, PathOrId, aliases
from sdtune.config.sections import (
    DroppedClasses,
    Hub,
    ImageSize,
    Optim,
    Phases,
    Plain,
    Preview,
    Run,
    SavedModel,
    Streaming,
)


class ProgressiveConfig(DroppedClasses, SavedModel, Phases, Streaming, ImageSize, Optim, Preview, Hub, Run, Plain):
    """A model of pixels in half as many steps, phase after phase (progressive distillation; Salimans & Ho 2022)."""

    method: ClassVar[str] = "progressive"
    entry: ClassVar[str] = "sdtune.recipes.progressive:Progressive"
    examples: ClassVar[str] = r"""
    sdtune progressive --config progressive/digits
    sdtune progressive --model google/ddpm-cifar10-32 --dataset photos --resolution 32 \
        --sampling-steps 8 4 2 1 --steps 40000
    sdtune sample --model runs/progressive --num-images-per-prompt 16
    """

    # No options here: samples are drawn in the steps of the phase, by the model's own network
    validation_inference_steps: ClassVar[int] = 0  # type: ignore[misc]
    unet_config: ClassVar[None] = None
    channels: ClassVar[None] = None

    model: Annotated[PathOrId, aliases("pretrained_model_name_or_path", "pretrained_teacher_model")]
    """Model of pixels that is distilled: a run's folder, or the folder or Hub id of a DDPMPipeline."""
    sampling_steps: Annotated[Counts, Field(min_length=1)] = [8, 4, 2, 1]
    """Steps of the student in each phase, half as many in each as in the one before; the teacher begins with twice."""
    output_dir: Path = Path("runs/progressive")
    resolution: Annotated[int, Ge(8)] = 64
    """Side of the training images in pixels; it has to be the model's."""
    train_batch_size: Count = 16
    steps: Annotated[Count | None, aliases("max_train_steps")] = None
    """Optimizer steps of all phases together. Default: 20,000, unless num_train_epochs is given."""
    adam_weight_decay: NonNegative = 0.0

    @property
    def max_steps(self) -> int:
        return self.steps or 20_000

    @model_validator(mode="after")
    def _halves(self) -> Self:
        for before, after in pairwise(self.sampling_steps):
            if before != 2 * after:
                raise ValueError(f"sampling_steps: {after} is not half of {before}; as in 8 4 2 1")
        return self

    def describe(self) -> Description:
        return super().describe()._replace(base=self.model, revision=self.revision)
