"""Options of `sdtune consistency`."""

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Interval
from pydantic import model_validator

from sdtune.config.methods.ddpm import refuse_two_networks
from sdtune.config.section_base import (
    Count,
    Description,
    Natural,
    NonNegative,
    PathOrId,
    Positive,
    Share,
    aliases,
    requires,
)
from sdtune.config.sections import (
    DroppedClasses,
    Hub,
    ImageSize,
    LrSchedule,
    Network,
    Optim,
    Phases,
    Plain,
    Preview,
    ResidualBlocks,
    Run,
    SavedModel,
    Streaming,
)


class ConsistencyConfig(
    Network, ResidualBlocks, DroppedClasses, SavedModel, Phases, Streaming, ImageSize, Optim, Preview, Hub, Run, Plain
):
    """A model of pixels in one or a few steps, distilled or from scratch (consistency models; Song et al. 2023)."""

    method: ClassVar[str] = "consistency"
    entry: ClassVar[str] = "sdtune.recipes.consistency:ConsistencyModel"
    examples: ClassVar[str] = r"""
    sdtune consistency --config consistency/digits
    sdtune consistency --model google/ddpm-cifar10-32 --dataset photos --resolution 32
    sdtune sample --model runs/consistency --num-images-per-prompt 16 --steps 1
    """

    # No options here: stock ConsistencyModelPipeline draws squares
    width: ClassVar[None] = None  # type: ignore[misc]
    height: ClassVar[None] = None  # type: ignore[misc]

    model: Annotated[PathOrId | None, aliases("pretrained_model_name_or_path", "pretrained_teacher_model")] = None
    """Distil this model of pixels: a run's folder, or the folder or Hub id of a DDPMPipeline. Default: from scratch."""
    unet_config: Annotated[Path | None, aliases("model_config_name_or_path")] = None
    """JSON file that describes the network, as diffusers' unet/config.json. Default: use the network options."""
    solver: Annotated[Literal["heun", "euler"], requires("model")] = "heun"
    """How the teacher goes from one noise level to the next: heun asks it twice, euler once."""
    match_steps: Annotated[Natural, requires("model")] = 0
    """First optimizer steps, in which the student learns to say what the teacher says. 0 leaves them out."""
    sigma_min: Positive = 0.002
    """Least noise level, at which the model gives back its input."""
    sigma_max: Positive = 80.0
    """Highest noise level, from which sampling starts."""
    sigma_data: Positive = 0.5
    """Standard deviation of the images, for the weights of input and prediction."""
    rho: Positive = 7.0
    """How close the noise levels are at the lower end (Karras et al. 2022, equation 5)."""
    discretization: Literal["doubling", "square_root", "constant"] = "doubling"
    """How their number grows from s_0 to s_1: doubling (Song & Dhariwal 2023), square_root (Song et al. 2023), not."""
    discretization_s_0: Annotated[Count, aliases("s_0")] = 10
    """Intervals between noise levels at first."""
    discretization_s_1: Annotated[Count, aliases("s_1")] = 1280
    """Intervals between noise levels at the end."""
    density: Literal["lognormal", "uniform"] = "lognormal"
    """How often each interval is drawn."""
    p_mean: Annotated[float, requires("density", "lognormal")] = -1.1
    """Mean of the logarithm of the noise level."""
    p_std: Annotated[Positive, requires("density", "lognormal")] = 2.0
    """Standard deviation of the logarithm of the noise level."""
    loss_type: Literal["huber", "l2"] = "huber"
    """Pseudo-Huber, with each interval weighed by the inverse of its length, or mean squared error without a weight."""
    huber_c: Annotated[Positive | None, requires("loss_type", "huber")] = None
    """Error of an image at which the loss turns linear. Default: 0.00054 times the root of its number of values."""
    target_decay: Share = 0.0
    """Decay of the target network, an average of the student. 0 makes the student its own target."""
    output_dir: Path = Path("runs/consistency")

    resolution: Annotated[int, Ge(8)] = 64
    """Side of the training images in pixels; of a model that is distilled, its own."""
    train_batch_size: Count = 16
    steps: Annotated[Count | None, aliases("max_train_steps")] = None
    """Optimizer steps. Default: 20,000, unless num_train_epochs is given."""
    lr_scheduler: LrSchedule = "constant"
    adam_weight_decay: NonNegative = 0.0
    use_ema: bool = True
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.99993
    ema_power: Positive = 3 / 4
    validation_inference_steps: Count = 2

    @property
    def max_steps(self) -> int:
        return self.steps or 20_000

    @property
    def doublings(self) -> int:
        """How often s_0 is doubled to reach s_1."""
        return math.ceil(math.log2(self.discretization_s_1 / self.discretization_s_0))

    @model_validator(mode="after")
    def _levels(self) -> Self:
        refuse_two_networks(self)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} is not below sigma_max {self.sigma_max:g}")
        s_0, s_1 = self.discretization_s_0, self.discretization_s_1
        if self.discretization == "constant" and self.phase_steps:
            raise ValueError(
                "phase_steps has no effect with discretization constant, which has no phases; leave it out"
            )
        if s_0 > s_1:
            raise ValueError(f"discretization_s_0 {s_0} is more than discretization_s_1 {s_1}")
        return self

    def describe(self) -> Description:
        return super().describe()._replace(base=self.model, revision=self.revision)
