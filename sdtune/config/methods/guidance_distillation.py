"""Options of `sdtune guidance-distillation`."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Interval
from pydantic import Field, model_validator

from sdtune.config.section_base import Counts, NonNegative
from sdtune.config.sections import (
    Captions,
    Data,
    Hub,
    Latents,
    Model,
    Optim,
    Phases,
    Plain,
    Preview,
    Prompts,
    Run,
    Streaming,
)


class GuidanceDistillationConfig(
    Phases, Model, Captions, Latents, Streaming, Data, Optim, Prompts, Preview, Hub, Run, Plain
):
    """Guided pictures in half as many steps, phase after phase, guidance told to one network (Meng et al. 2023)."""

    method: ClassVar[str] = "guidance-distillation"
    entry: ClassVar[str] = "sdtune.recipes.guidance_distillation:GuidanceDistillation"
    examples: ClassVar[str] = r"""
    sdtune guidance-distillation --config guidance-distillation/tiny
    sdtune guidance-distillation --model stabilityai/stable-diffusion-2-1 --dataset photos \
        --sampling-steps 20 10 5 --steps 40000 --mixed-precision bf16
    sdtune sample --model runs/guidance-distillation --prompt "a red bird" --guidance-scale 8
    """

    # No options here: all weights train, and samples are drawn in the steps of the phase, by one pass a step
    lora: ClassVar[bool] = False
    quantize_base: ClassVar[None] = None
    loss_type: ClassVar[Literal["l2"]] = "l2"
    huber_c: ClassVar[float] = 0.1
    validation_inference_steps: ClassVar[int] = 0  # type: ignore[misc]
    negative_prompt: ClassVar[str] = ""  # type: ignore[misc]

    sampling_steps: Annotated[Counts, Field(min_length=1)] = [20, 10, 5]
    """Steps of the student in each phase after the first, half as many in each as in the one before."""
    w_min: NonNegative = 0.0
    """Lowest guidance w that is learnt; the guidance scale of a pipeline is w + 1."""
    w_max: NonNegative = 14.0
    """Highest guidance w that is learnt."""
    time_cond_proj_dim: Annotated[int, Interval(ge=4, le=4096)] = 256
    """Numbers in which the student is told w; an even number."""
    validation_guidance_scale: NonNegative | None = None  # type: ignore[assignment]
    """Guidance of the samples. Default: in the middle of what is learnt."""
    output_dir: Path = Path("runs/guidance-distillation")

    @property
    def shown_guidance(self) -> float:
        """The guidance scale of a pipeline for samples."""
        middle = 1 + (self.w_min + self.w_max) / 2
        return middle if self.validation_guidance_scale is None else self.validation_guidance_scale

    @model_validator(mode="after")
    def _halves(self) -> Self:
        for before, after in pairwise(self.sampling_steps):
            if before != 2 * after:
                raise ValueError(f"sampling_steps: {after} is not half of {before}; as in 20 10 5")
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min:g} is above w_max {self.w_max:g}")
        if self.time_cond_proj_dim % 2:
            raise ValueError(f"time_cond_proj_dim {self.time_cond_proj_dim} is odd: half of it are sines, half cosines")
        return self
