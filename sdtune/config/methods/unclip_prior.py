"""Options of `sdtune prior`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge
from pydantic import model_validator

from sdtune.config.section_base import (
    Count,
    Description,
    NameList,
    Natural,
    NonNegative,
    PathOrId,
    Positive,
    Share,
    aliases,
    requires,
)
from sdtune.config.sections import Captions, Data, Hub, LrSchedule, Optim, OptionalLora, Run, SavedModel

NEW = ("clip_model", "num_layers", "attention_head_dim")
"""Options that describe a new prior."""


class PriorConfig(OptionalLora, SavedModel, Captions, Data, Optim, Hub, Run):
    """From captions to CLIP embeddings of pictures: the prior of unCLIP and Kandinsky 2.2 (Ramesh et al. 2022)."""

    method: ClassVar[str] = "prior"
    entry: ClassVar[str] = "sdtune.recipes.prior:Prior"
    examples: ClassVar[str] = r"""
    sdtune prior --config prior/tiny-shapes
    sdtune prior --model kandinsky-community/kandinsky-2-2-prior --dataset photos \
        --resolution 224 --lora --mixed-precision bf16
    sdtune prior --clip-model runs/clip --dataset photos --resolution 64
    """

    # No options here
    quantize_base: ClassVar[None] = None  # type: ignore[misc]
    lora_plus_ratio: ClassVar[float] = 1.0  # type: ignore[misc]
    answers: ClassVar[dict[str, str]] = dict.fromkeys(
        ("num_validation_images", "validation_prompt", "validation_prompts"),
        "a prior draws embeddings and no pictures; leave the flag out",
    ) | {"pretrained_decoder_model_name_or_path": "a prior is trained without a decoder; leave the flag out"}
    # What it learns are embeddings, of which there is no picture to show
    num_validation_images: ClassVar[int] = 0
    evaluate_steps: ClassVar[int] = 0
    keep_best: ClassVar[None] = None
    patience: ClassVar[int] = 0
    compile: ClassVar[bool] = False  # type: ignore[misc]
    gradient_checkpointing: ClassVar[bool] = False  # type: ignore[misc]

    output_dir: Path = Path("runs/prior")
    model: Annotated[
        PathOrId | None, aliases("pretrained_prior_model_name_or_path", "pretrained_model_name_or_path")
    ] = None
    """KandinskyV22PriorPipeline to continue: folder or Hub id. Leave out for a new prior, which needs clip_model."""
    clip_model: PathOrId | None = None
    """CLIP whose embeddings a new prior learns: folder or Hub id. Leave out with model, which has its own."""
    num_layers: Count = 4
    """Layers of a new prior. Their width is that of CLIP's text encoder."""
    attention_head_dim: Count = 32
    """Channels of an attention head of a new prior."""
    snr_gamma: Positive | None = None
    """Weigh the loss by the signal-to-noise ratio, at most this (Hang et al. 2023). Leave out to weigh all alike."""
    lora: bool = False
    """Train low-rank adapters in place of all weights; needs model."""
    target_modules: Annotated[NameList, aliases("lora_target_modules", "lora_layers"), requires("lora")] = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    ]
    """Modules of the prior that get an adapter: ends of names, or a regular expression."""
    validation_steps: Natural = 200
    """Steps between measurements on held-out images. 0 measures only at the start and at the end."""

    resolution: Annotated[int, Ge(8)] = 224
    """Side of the pictures that CLIP sees, in pixels."""
    caption_dropout: Share = 0.1
    train_batch_size: Count = 64
    learning_rate: Positive = 1e-4
    lr_scheduler: LrSchedule = "cosine"
    adam_weight_decay: NonNegative = 1e-2

    @model_validator(mode="after")
    def _one_prior(self) -> Self:
        if self.buckets:
            raise ValueError("buckets: CLIP sees squares; leave it out")
        if self.model and (given := [name for name in NEW if getattr(self, name) != default(type(self), name)]):
            raise ValueError(f"{given[0]} describes a new prior, and model names one that is continued: give one")
        if not self.model and not self.clip_model:
            raise ValueError("model or clip_model: give a prior to continue, or the CLIP of a new one")
        if not self.model and self.revision:
            raise ValueError("revision is of model: give that, or leave revision out")
        if not self.model and self.lora:
            raise ValueError("lora adapts a prior that there is: give model")
        return self

    def describe(self) -> Description:
        known = super().describe()._replace(base=self.model, revision=self.revision)
        return known if self.lora else known._replace(adapter="", rank=None, alpha=None)


def default(config: type[PriorConfig], name: str) -> Any:
    return config.model_fields[name].default
