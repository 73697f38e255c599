"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): two CLIP text encoders and T5, MMDiT on 16-channel latents."""

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from sdtune.diffusion.objective import Objective
from sdtune.diffusion.rectified_flow import RectifiedFlow
from sdtune.models.families.latent import FLOW_ONLY
from sdtune.models.families.stable_diffusion_3_control import StableDiffusion3Control

PROJECTIONS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()


class StableDiffusion3(StableDiffusion3Control):
    pipeline_class: ClassVar[Any] = StableDiffusion3Pipeline
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_encoders: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    trainable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    lora_targets: ClassVar[tuple[str, ...]] = tuple(f"attn.{name}" for name in PROJECTIONS)
    options: ClassVar[frozenset[str]] = FLOW_ONLY | {"t5", "max_sequence_length"}
    prompt_arguments: ClassVar[tuple[str, ...]] = ("prompt", "prompt_2", "prompt_3")
    max_tokens: ClassVar[int | None] = 256
    clip_layer: ClassVar[int | None] = 2

    def wants(self, encoder: str, cfg: Any) -> bool:
        return cfg.t5

    def unused_layers(self, part: str) -> str | None:
        """The last block reads the text and gives none."""
        if part != self.denoiser_name:
            return None
        return rf"transformer_blocks\.{self.denoiser.config.num_layers - 1}\.attn\.(add_q_proj|norm_added_q)"

    def make_objective(self) -> Objective:
        return RectifiedFlow.of(self.cfg, self.cfg, self.scheduler, "logit_normal", self.patch)

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        embeds, _, pooled, _ = encoded
        return {"embeds": embeds, "pooled": pooled}

    def inputs(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the denoiser, and of networks made from it."""
        dtype = self.dtype
        return {
            "hidden_states": x_t.to(dtype),
            "timestep": t * 1000,
            "encoder_hidden_states": cond["embeds"].to(dtype),
            "pooled_projections": cond["pooled"].to(dtype),
        }

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], **more: Any) -> Tensor:
        return self.denoiser(**self.inputs(x_t, t, cond), **more).sample
