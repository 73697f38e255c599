"""Options of `sdtune reflow`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from sdtune.config.section_base import Count, Description, PathOrId, Positive, requires
from sdtune.config.sections import (
    Captions,
    Data,
    Hub,
    Latents,
    Model,
    Optim,
    OptionalLora,
    Plain,
    Preview,
    Prompts,
    Run,
    Streaming,
)


class ReflowConfig(OptionalLora, Model, Captions, Latents, Streaming, Data, Optim, Prompts, Preview, Hub, Run, Plain):
    """A flow-matching base in one or a few steps: its paths made straight (reflow; Liu et al. 2022), or as LoRA."""

    method: ClassVar[str] = "reflow"
    entry: ClassVar[str] = "sdtune.recipes.reflow:Reflow"
    examples: ClassVar[str] = r"""
    sdtune reflow --config reflow/tiny-flow
    sdtune reflow --model black-forest-labs/FLUX.2-klein-base-4B --dataset photos \
        --lora --rank 64 --mixed-precision bf16 --gradient-checkpointing
    sdtune sample --model runs/reflow --prompt "a red bird" --steps 2
    """

    # What is shown is drawn without guidance, which is built in, or with that which the denoiser is told
    validation_guidance_scale: ClassVar[float] = 1.0  # type: ignore[misc]
    negative_prompt: ClassVar[str] = ""  # type: ignore[misc]

    model: PathOrId = "tiny-flow"
    lora: bool = False
    """Train low-rank adapters in place of all weights; the teacher is then the base without them."""
    teacher_steps: Annotated[int, Ge(2)] = 25
    """Steps in which the base goes from the noise to the image that the student learns."""
    teacher_guidance_scale: Positive | None = None
    """Guidance of the base, built into the student; 1 is none. Default: 4, and none for a base that is told it."""
    loss_type: Literal["l2", "huber"] = "l2"
    """Mean squared error, or pseudo-Huber, which forgives outliers (Song & Dhariwal 2023)."""
    huber_c: Annotated[Positive, requires("loss_type", "huber")] = 0.1
    """Error at which the Huber loss turns from quadratic to linear."""

    rank: Annotated[Count, requires("lora")] = 64
    validation_inference_steps: Count = 2
    output_dir: Path = Path("runs/reflow")

    def describe(self) -> Description:
        known = super().describe()
        return known if self.lora else known._replace(adapter="", rank=None, alpha=None)
