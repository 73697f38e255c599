"""Options of `sdtune lcm`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Interval
from pydantic import model_validator

from sdtune.config.section_base import (
    Count,
    Description,
    NameList,
    NonNegative,
    PathOrId,
    Positive,
    Share,
    aliases,
    requires,
)
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

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]


class LcmConfig(OptionalLora, Model, Captions, Latents, Streaming, Data, Optim, Prompts, Preview, Hub, Run, Plain):
    """Pictures in one to eight steps, learnt from the base itself (LCM; Luo et al. 2023), all weights or as LoRA."""

    method: ClassVar[str] = "lcm"
    entry: ClassVar[str] = "sdtune.recipes.lcm:Lcm"
    examples: ClassVar[str] = r"""
    sdtune lcm --config lcm/tiny
    sdtune lcm --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset photos --lora --mixed-precision bf16
    sdtune sample --model runs/lcm --prompt "a red bird" --steps 4
    """

    # No options here: the target is the average
    use_ema: ClassVar[bool] = False  # type: ignore[misc]
    ema_decay: ClassVar[float] = 0.0  # type: ignore[misc]
    ema_warmup: ClassVar[Literal["power"]] = "power"  # type: ignore[misc]
    ema_inv_gamma: ClassVar[float] = 1.0  # type: ignore[misc]
    ema_power: ClassVar[float] = 1.0  # type: ignore[misc]

    model: Annotated[PathOrId, aliases("pretrained_teacher_model")] = "tiny"
    revision: Annotated[str | None, aliases("teacher_revision")] = None
    dataset: Annotated[PathOrId, aliases("train_shards_path_or_url")]
    lora: bool = False
    """Train low-rank adapters in place of all weights (LCM-LoRA; Luo et al. 2023)."""
    w_min: NonNegative = 5.0
    """Lowest guidance w that is learnt; the guidance scale of a pipeline is w + 1."""
    w_max: NonNegative = 15.0
    """Highest guidance w that is learnt."""
    num_ddim_timesteps: Annotated[int, Ge(2)] = 50
    """Steps of the teacher, over one of which the student learns at a time; it has to divide the base's timesteps."""
    time_cond_proj_dim: Annotated[Annotated[int, Interval(ge=4, le=4096)], aliases("unet_time_cond_proj_dim")] = 256
    """Numbers in which the student is told w; an even number. Of no use with lora, where w is not told."""
    timestep_scaling: Annotated[Positive, aliases("timestep_scaling_factor")] = 10.0
    """Factor of the timestep in the weights of input and prediction: with more, the input counts at fewer timesteps."""
    target_decay: Annotated[Share, aliases("ema_decay")] = 0.95
    """Decay of the target network, an average of the student. Of no use with lora, where the student is the target."""
    loss_type: Literal["l2", "huber"] = "huber"
    """Mean squared error, or pseudo-Huber, which forgives outliers (Song & Dhariwal 2023)."""
    huber_c: Annotated[Positive, requires("loss_type", "huber")] = 1e-3
    """Error at which the Huber loss turns from quadratic to linear."""

    rank: Annotated[Count, requires("lora")] = 64
    target_modules: Annotated[NameList, aliases("lora_target_modules", "lora_layers"), requires("lora")] = [
        *ATTENTION,
        *CONVOLUTIONS,
    ]
    """Modules of the UNet that get an adapter: ends of names, or a regular expression."""
    validation_inference_steps: Count = 4
    validation_guidance_scale: NonNegative | None = None  # type: ignore[assignment]
    """Guidance of the samples. Default: with lora 1, which is none; else in the middle of what is learnt."""
    output_dir: Path = Path("runs/lcm")

    @property
    def shown_guidance(self) -> float:
        """The guidance scale of a pipeline for samples."""
        if self.validation_guidance_scale is not None:
            return self.validation_guidance_scale
        return 1.0 if self.lora else 1 + (self.w_min + self.w_max) / 2

    @model_validator(mode="after")
    def _what_is_told(self) -> Self:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min:g} is above w_max {self.w_max:g}")
        if self.time_cond_proj_dim % 2:
            raise ValueError(f"time_cond_proj_dim {self.time_cond_proj_dim} is odd: half of it are sines, half cosines")
        for name in ("time_cond_proj_dim", "target_decay"):
            if self.lora and getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(f"{name} has no effect with lora: the base has no place for it; leave it out")
        return self

    def describe(self) -> Description:
        known = super().describe()
        return known if self.lora else known._replace(adapter="", rank=None, alpha=None)
