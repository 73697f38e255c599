"""Options of `sdtune ddpm`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge
from pydantic import model_validator

from sdtune.config.section_base import (
    Count,
    Description,
    Levels,
    Natural,
    NonNegative,
    PathOrId,
    Positive,
    Share,
    aliases,
    requires,
)
from sdtune.config.sections import (
    Denoising,
    DroppedClasses,
    Hub,
    ImageSize,
    LrSchedule,
    Network,
    Optim,
    OutOfRange,
    Preview,
    ResidualBlocks,
    Run,
    SavedModel,
    Schedule,
    Streaming,
)


class DdpmConfig(
    Network,
    ResidualBlocks,
    Schedule,
    OutOfRange,
    Denoising,
    DroppedClasses,
    SavedModel,
    Streaming,
    ImageSize,
    Optim,
    Preview,
    Hub,
    Run,
):
    """A diffusion model of pixels, from scratch or continued, with classes or without (DDPM; Ho et al. 2020)."""

    method: ClassVar[str] = "ddpm"
    entry: ClassVar[str] = "sdtune.recipes.ddpm:Ddpm"
    examples: ClassVar[str] = r"""
    sdtune ddpm --dataset photos --resolution 64
    sdtune ddpm --dataset photos --resolution 32 --class-column folder \
        --steps 50000 --mixed-precision bf16
    sdtune ddpm --dataset photos --model google/ddpm-cifar10-32 --resolution 32
    """

    output_dir: Path = Path("runs/ddpm")
    model: Annotated[PathOrId | None, aliases("pretrained_model_name_or_path")] = None
    """Continue this model: a run's folder, or the folder or Hub id of a DDPMPipeline. Default: start from scratch."""
    unet_config: Annotated[Path | None, aliases("model_config_name_or_path")] = None
    """JSON file that describes the network, as diffusers' unet/config.json. Default: use the network options."""
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] | None = None
    """Variance of a step: beta-tilde, beta, or learned between. Default: the model's; from scratch, fixed_small."""
    levels: Annotated[Levels, requires("variance_type", "learned_range")] = 256
    """Values that a pixel can have, for the bound that a learned variance trains on: 256 in 8 bits, 17 of digits."""

    validation_guidance_scale: Annotated[NonNegative, requires("class_column")] = 1.0
    """Classifier-free guidance of the samples towards their classes (Ho & Salimans 2022). 1 means no guidance."""

    resolution: Annotated[int, Ge(8)] = 64
    train_batch_size: Count = 16
    steps: Annotated[Count | None, aliases("max_train_steps")] = None
    """Optimizer steps. Default: 20,000, unless num_train_epochs is given."""
    lr_scheduler: LrSchedule = "cosine"
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
        refuse_two_networks(self)
        return self

    @model_validator(mode="after")
    def _a_null_class(self) -> Self:
        if self.validation_guidance_scale != 1 and self.class_dropout == 0:
            raise ValueError("validation_guidance_scale with class_dropout 0: guidance needs the null class, untrained")
        return self

    def describe(self) -> Description:
        return super().describe()._replace(base=self.model, revision=self.revision)


def refuse_two_networks(cfg: Any) -> None:
    """Raises: ValueError where a model or a file describes the network, and options do too."""
    given = [name for name in ("model", "unet_config") if getattr(cfg, name)]
    fields = Network.model_fields | ResidualBlocks.model_fields
    given += [name for name, f in fields.items() if name != "channels" and getattr(cfg, name) != f.default]
    if len(given) > 1 and given[0] in ("model", "unet_config"):
        raise ValueError(f"{given[0]} describes the whole network: leave out {' and '.join(given[1:])}")
