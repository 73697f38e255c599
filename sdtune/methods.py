"""One config class per method: the sections it reads, its own fields, and the defaults that are its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge
from pydantic import model_validator

from sdtune.configs import (
    Adapter,
    Captions,
    Classes,
    Count,
    Counts,
    Data,
    Decline,
    Denoising,
    Hub,
    Model,
    Natural,
    Network,
    NonNegative,
    Optim,
    Positive,
    Preview,
    Prompts,
    Run,
    Schedule,
    Share,
    also,
)


class LoraConfig(Adapter, Denoising, Model, Captions, Data, Optim, Prompts, Preview, Hub, Run):
    """Low-rank adapters on a text-to-image model (LoRA; Hu et al. 2021)."""

    method: ClassVar[str] = "lora"
    entry: ClassVar[str] = "sdtune.recipes.lora:Lora"

    output_dir: Path = Path("runs/lora")


class DdpmConfig(Network, Schedule, Denoising, Classes, Data, Optim, Preview, Hub, Run):
    """A diffusion model of pixels, from scratch or continued, with classes or without (DDPM; Ho et al. 2020)."""

    method: ClassVar[str] = "ddpm"
    entry: ClassVar[str] = "sdtune.recipes.ddpm:Ddpm"

    output_dir: Path = Path("runs/ddpm")
    model: Annotated[str | None, also("pretrained_model_name_or_path")] = None
    """Continue this model: a run's folder, or the folder or Hub id of a DDPMPipeline; none starts from scratch."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; none is its main branch."""
    cache_dir: Path | None = None
    """Where models and datasets from the Hub are kept; none is the Hub's own cache folder."""
    unet_config: Annotated[Path | None, also("model_config_name_or_path")] = None
    """JSON file that describes the network, as diffusers' unet/config.json; none goes by the options of Network."""
    variance_type: Literal["fixed_small", "fixed_large"] | None = None
    """Variance of a sampling step: beta-tilde, or beta; none is the model's, from scratch fixed_small."""
    out_of_range: Literal["clip", "keep"] | None = None
    """What sampling does with estimates of the image beyond [-1, 1]; none is the model's, from scratch clip."""
    class_dropout: Share = 0.1
    """Share of classes replaced by the null class, which is what classifier-free guidance learns from."""

    resolution: Annotated[int, Ge(8)] = 64
    train_batch_size: Count = 16
    steps: Annotated[Count | None, also("max_train_steps")] = None
    """Optimizer steps; none with no num_train_epochs either is 20,000."""
    lr_scheduler: Decline = "cosine"
    lr_warmup_steps: Natural = 500
    adam_beta1: Share = 0.95
    adam_weight_decay: NonNegative = 1e-6
    use_ema: bool = True
    ema_power: Positive = 3 / 4

    @property
    def max_steps(self) -> int:
        return self.steps or 20_000

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        given = [name for name in ("model", "unet_config") if getattr(self, name)]
        fields = [name for name in Network.model_fields if name != "channels"]
        given += [name for name in fields if getattr(self, name) != Network.model_fields[name].default]
        if len(given) > 1 and given[0] in ("model", "unet_config"):
            raise ValueError(f"{given[0]} describes the whole network: leave out {' and '.join(given[1:])}")
        return self


class ClassifierConfig(Network, Schedule, Classes, Data, Optim, Hub, Run):
    """A classifier of noised images, which guides a diffusion model (Dhariwal & Nichol 2021)."""

    method: ClassVar[str] = "classifier"
    entry: ClassVar[str] = "sdtune.recipes.classifier:Classifier"
    num_validation_images: ClassVar[int] = 0
    """It draws none."""

    output_dir: Path = Path("runs/classifier")
    class_column: str
    validation_steps: Natural = 200
    """Steps between the figures of held-out images; 0 measures only at the start and the end."""
    rescale_betas_zero_snr: bool = False
    """The schedule ends in pure noise (Lin et al. 2023), as that of the model which is to be guided."""

    resolution: Annotated[int, Ge(8)] = 64
    block_out_channels: Counts = [128, 128, 256, 256]
    attention_resolutions: Counts = [32, 16, 8]
    attention_head_dim: Count | None = 64
    train_batch_size: Count = 64
    learning_rate: Positive = 3e-4
    lr_scheduler: Decline = "linear"
    adam_weight_decay: NonNegative = 0.05

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.buckets:
            raise ValueError("buckets: a classifier sees one shape; leave it out")
        return self


METHODS: tuple[type[Run], ...] = (LoraConfig, DdpmConfig, ClassifierConfig)
"""The commands that train, in the order in which --help lists them."""


def config_class(settings: Mapping[str, Any]) -> type[Run]:
    """The config class of a run's ``config.yaml``; of a recipe of one's own, the one whose keys are most alike.

    The runs of a time when `method` was not written down were all LoRA.
    """
    name = settings.get("method", LoraConfig.method)
    for config in METHODS:
        if config.method == name:
            return config
    keys = settings.keys()
    return max(METHODS, key=lambda c: len(keys & c.model_fields.keys()) / len(keys | c.model_fields.keys()))


MAY_CHANGE = frozenset(
    "steps num_train_epochs output_dir dataloader_num_workers cache cache_dir gradient_checkpointing "
    "checkpointing_steps checkpoints_total_limit export_steps max_bad_steps log_steps report_to tracker_project_name "
    "train_batch_size gradient_accumulation_steps validation_prompt negative_prompt num_validation_images "
    "validation_steps validation_inference_steps validation_guidance_scale push_to_hub hub_model_id hub_private "
    "hub_revision hub_create_pr hub_strategy license".split()
)
"""What may differ when a run is continued: none of it touches an image, a draw or the mathematics of a step.

The batch may be cut differently, as long as the images per optimizer step stay the same.
"""
