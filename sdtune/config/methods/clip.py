"""Options of `sdtune clip`."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from annotated_types import Ge
from pydantic import model_validator

from sdtune.config.section_base import Count, Description, Natural, NonNegative, PathOrId, Positive, Share
from sdtune.config.sections import Captions, Data, Hub, LrSchedule, Optim, Run

NEW = ("tokenizer", "patch_size", "hidden_size", "image_layers", "text_layers", "projection_dim")
"""Options that describe a new model."""


class ClipConfig(Captions, Data, Optim, Hub, Run):
    """A CLIP of pictures and captions, from nothing or continued (Radford et al. 2021)."""

    method: ClassVar[str] = "clip"
    entry: ClassVar[str] = "sdtune.recipes.clip:Clip"
    examples: ClassVar[str] = r"""
    sdtune clip --config clip/tiny-shapes
    sdtune clip --model openai/clip-vit-base-patch32 --dataset photos --resolution 224 \
        --train-batch-size 256 --chunk-size 32 --learning-rate 1e-5 --mixed-precision bf16
    sdtune evaluate samples --reference photos --clip-model runs/clip
    """
    num_validation_images: ClassVar[int] = 0
    """It draws none."""
    evaluate_steps: ClassVar[int] = 0
    keep_best: ClassVar[None] = None
    patience: ClassVar[int] = 0
    cache: ClassVar[bool] = False  # type: ignore[misc]
    lazy_cache: ClassVar[bool] = False  # type: ignore[misc]
    compile: ClassVar[bool] = False  # type: ignore[misc]

    output_dir: Path = Path("runs/clip")
    model: PathOrId | None = None
    """CLIP to continue: folder or Hub id. Leave out for a new one, whose weights start at random."""
    chunk_size: Count | None = None
    """Pictures and captions encoded at a time. Same result, less memory. Leave out for the whole batch."""
    noised: bool = False
    """Learn pictures with noise of any strength, for CLIP guidance that looks at those (Nichol et al. 2021)."""
    tokenizer: PathOrId = "tiny"
    """Pipeline folder or CLIP whose tokenizer a new CLIP has. `tiny` is built in, and knows 663 parts of words."""
    patch_size: Count = 8
    """Side of a patch in pixels, in a new CLIP."""
    hidden_size: Count = 128
    """Width of both towers of a new CLIP, a multiple of 32: 32 channels make an attention head."""
    image_layers: Count = 4
    """Layers of a new CLIP that read the picture."""
    text_layers: Count = 2
    """Layers of a new CLIP that read the caption."""
    projection_dim: Count = 64
    """Length of the embeddings of a new CLIP."""
    validation_steps: Natural = 200
    """Steps between measurements on held-out images. 0 measures only at the start and at the end."""

    resolution: Annotated[int, Ge(8)] = 64
    train_batch_size: Count = 64
    learning_rate: Positive = 5e-4
    lr_scheduler: LrSchedule = "cosine"
    adam_beta2: Share = 0.98
    adam_weight_decay: NonNegative = 0.1

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.buckets:
            raise ValueError("buckets: a CLIP sees squares; leave it out")
        if self.model and (given := [name for name in NEW if getattr(self, name) != self.default(name)]):
            raise ValueError(f"{given[0]} describes a new CLIP, and model names one that is continued: give one")
        if self.hidden_size % 32:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of 32")
        return self

    @classmethod
    def default(cls, name: str) -> object:
        return cls.model_fields[name].default

    def describe(self) -> Description:
        return super().describe()._replace(base=self.model)
