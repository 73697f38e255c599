"""Options of `sdtune super-resolution`."""

from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge

from sdtune.config.section_base import Count, Levels, Natural, NonNegative, Positive, Share, aliases
from sdtune.config.sections import (
    Denoising,
    Hub,
    ImageSize,
    LrSchedule,
    Network,
    Optim,
    OutOfRange,
    Run,
    Schedule,
    Streaming,
)


class SuperResolutionConfig(Network, Schedule, OutOfRange, Denoising, Streaming, ImageSize, Optim, Hub, Run):
    """A diffusion model of pixels that enlarges small images, a stage of a cascade (Ho et al. 2021)."""

    method: ClassVar[str] = "super-resolution"
    entry: ClassVar[str] = "sdtune.recipes.super_resolution:SuperResolution"
    examples: ClassVar[str] = r"""
    sdtune super-resolution --config super-resolution/tiny-shapes
    sdtune super-resolution --dataset photos --resolution 256 --factor 4 --mixed-precision bf16
    sdtune sample --model runs/super-resolution --image small.png
    sdtune sample --model runs/ddpm --then runs/super-resolution
    """
    channels: ClassVar[int] = 3  # type: ignore[misc]
    """The stock pipeline reads images in colour alone."""
    variance_type: ClassVar[str] = "learned_range"
    """The stock pipeline takes a network with twice the channels of an image."""
    evaluate_steps: ClassVar[int] = 0
    """Its samples are enlarged images, which are compared with their own originals."""
    keep_best: ClassVar[None] = None
    patience: ClassVar[int] = 0

    output_dir: Path = Path("runs/super-resolution")
    factor: Annotated[int, Ge(2)] = 4
    """How many times larger a side becomes. The small image is made from the large one, bicubic, without aliases."""
    max_noise_level: Natural = 400
    """Small images are noised up to this timestep, which the network is told: flaws then look like noise. 0: hardly."""
    levels: Levels = 256
    """Values that a pixel can have, for the bound that the learned variance trains on: 256 in files of 8 bits."""

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
    num_validation_images: Natural = 4
    """Images of a sample grid, each left of its enlargement. 0 draws no grid."""
    validation_steps: Natural = 200
    """Steps between sample grids, and between holdout losses. 0 makes them only at the start and at the end."""
    validation_inference_steps: Count = 25
    """Denoising steps of a sample, and of `sdtune sample` where it names none."""
    validation_image: list[Path] = []
    """Small images that the sample grids enlarge. Default: some of the dataset, made small."""

    @property
    def max_steps(self) -> int:
        return self.steps or 20_000
