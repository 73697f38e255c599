"""Options of `sdtune dreambooth`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import model_validator

from sdtune.config.methods.new_word import NewWord, says
from sdtune.config.methods.prior import Prior
from sdtune.config.section_base import Description, PathOrId, Positive, Share, aliases, requires
from sdtune.config.sections import (
    Adapter,
    BaseOptions,
    Captions,
    Data,
    Denoising,
    Hub,
    Masks,
    Model,
    Optim,
    Preview,
    Prompts,
    Run,
    finds_rate,
)


class DreamBoothConfig(
    Prior, NewWord, Adapter, Denoising, BaseOptions, Model, Captions, Masks, Data, Optim, Prompts, Preview, Hub, Run
):
    """A subject or style from a handful of images (DreamBooth; Ruiz et al. 2022), all weights or as LoRA."""

    method: ClassVar[str] = "dreambooth"
    entry: ClassVar[str] = "sdtune.recipes.dreambooth:DreamBooth"
    examples: ClassVar[str] = r"""
    sdtune dreambooth --dataset photos --instance-prompt "a photo of sks dog"
    sdtune dreambooth --dataset photos --instance-prompt "a photo of sks dog" \
        --lora --train-text-encoder --steps 500
    sdtune dreambooth --dataset photos --instance-prompt "a photo of sks dog" \
        --prior-preservation --class-prompt "a photo of a dog"
    """

    section_requires: ClassVar[dict[str, str]] = {"Adapter": "lora", "NewWord": "placeholder_token"}

    dataset: Annotated[PathOrId, aliases("instance_data", "instance_data_dir")]
    """Images of the subject: folder, Hub dataset id, or dataset saved by `save_to_disk`."""
    instance_prompt: str | None = None
    """Caption of images without one of their own, such as a photo of sks dog. Default: each image needs one."""
    lora: bool = False
    """Train low-rank adapters in place of all weights."""
    train_text_encoder: bool = False
    """Train the text encoder as well: all of it, or with --lora its q, k, v and out projections."""
    text_encoder_lr: Annotated[Positive | None, requires("train_text_encoder")] = None
    """Learning rate of the text encoder. Default: learning_rate."""
    placeholder_lr: Annotated[Positive | None, requires("placeholder_token")] = None
    """Learning rate of the new word's vectors. Default: learning_rate."""
    unet_frac: Annotated[Share, aliases("train_transformer_frac")] = 1.0
    """Share of the run, from its start, in which the denoiser (UNet or transformer) trains."""
    text_encoder_frac: Annotated[Share, aliases("train_text_encoder_frac"), requires("train_text_encoder")] = 1.0
    """Share of the run, from its start, in which the text encoder trains."""
    placeholder_frac: Annotated[Share, aliases("train_text_encoder_ti_frac"), requires("placeholder_token")] = 1.0
    """Share of the run, from its start, in which the new word's vectors train."""
    learning_rate: Positive = 5e-6
    """Peak learning rate; with --lora the default is 1e-4."""
    output_dir: Path = Path("runs/dreambooth")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_adapters(cls, values: Any) -> Any:
        lora = isinstance(values, dict) and str(values.get("lora", False)).lower() in ("true", "1", "yes", "on")
        return {"learning_rate": 1e-4} | values if lora and not finds_rate(values.get("optimizer")) else values

    @model_validator(mode="after")
    def _something_of_the_class(self) -> Self:
        self.check_class()
        return self

    @model_validator(mode="after")
    def _options_that_belong_together(self) -> Self:
        if word := self.placeholder_token:
            if not self.lora:
                raise ValueError("placeholder_token trains a new word beside adapters (pivotal tuning): add --lora")
            if self.instance_prompt and not says(self.instance_prompt, word):
                raise ValueError(f"instance_prompt does not say {word}, so the new word would not train; put it in")
            if any(says(prompt, word) for prompt in self.class_prompt):
                raise ValueError(f"class_prompt says {word}, which the base does not know; name the class alone")
        return self

    @model_validator(mode="after")
    def _something_trains_to_the_end(self) -> Self:
        shares = {"unet_frac": self.unet_frac}
        if self.train_text_encoder:
            shares["text_encoder_frac"] = self.text_encoder_frac
        if self.placeholder_token:
            shares["placeholder_frac"] = self.placeholder_frac
        if max(shares.values()) < 1:
            names = " and ".join(shares)
            raise ValueError(f"{names}: nothing would train to the end; leave one of them at 1, or ask for fewer steps")
        return self

    def describe(self) -> Description:
        known = super().describe()
        tags = ("dreambooth",) if self.instance_prompt else ()
        return known._replace(trigger=self.instance_prompt or known.trigger, tags=tags)
