"""FLUX.1 dev and schnell (2024): CLIP and T5, packed 16-channel latents; dev, being distilled, is told a guidance."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from sdtune.config.sections import BaseOptions, UserError
from sdtune.diffusion.objective import Objective
from sdtune.diffusion.rectified_flow import RectifiedFlow
from sdtune.models.families.flux_control import FluxControl
from sdtune.models.families.latent import FLOW_ONLY, made_on, pack, unpack

ATTENTION = "to_k to_q to_v to_out.0 add_k_proj add_q_proj add_v_proj to_add_out".split()
FEED_FORWARD = "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()


class Flux(FluxControl):
    pipeline_class: ClassVar[Any] = FluxPipeline
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    trainable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_targets: ClassVar[tuple[str, ...]] = (*(f"attn.{name}" for name in ATTENTION), *FEED_FORWARD)
    options: ClassVar[frozenset[str]] = FLOW_ONLY | {"guidance_embedding", "max_sequence_length"}
    encode_options: ClassVar[dict[str, Any]] = {}
    max_tokens: ClassVar[int | None] = 512

    def check(self) -> None:
        given = self.cfg.guidance_embedding != BaseOptions.model_fields["guidance_embedding"].get_default()
        if given and not self.denoiser.config.get("guidance_embeds"):
            raise UserError(f"--guidance-embedding: {self.cfg.model} is told no guidance; leave it out")

    def make_objective(self) -> Objective:
        return RectifiedFlow.of(self.cfg, self.cfg, self.scheduler, "uniform", self.patch)

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        embeds, pooled, _ = encoded
        return {"embeds": embeds, "pooled": pooled}

    def denoiser_inputs(self, x_t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the denoiser is told beside the image, the time and the words."""
        return {"pooled_projections": cond["pooled"].to(self.dtype), "guidance": self.guidance_input(x_t)}

    def inputs(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the denoiser, and of networks made from it."""
        x_t, embeds = x_t.to(self.dtype), cond["embeds"].to(self.dtype)
        kind, (height, width) = self.pipeline_class, pixel_unshuffle(x_t, 2).shape[-2:]
        return {
            "hidden_states": pack(x_t),
            "timestep": t,
            "encoder_hidden_states": embeds,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=self.dtype),
            "img_ids": made_on(x_t.device, kind._prepare_latent_image_ids, 1, height, width, x_t.device, self.dtype),
            **self.denoiser_inputs(x_t, cond),
        }

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], **more: Any) -> Tensor:
        velocity = self.denoiser(**self.inputs(x_t, t, cond), **more, return_dict=False)[0]
        return unpack(velocity, x_t)

    @classmethod
    def guidance(cls, scale: float, negative: str) -> dict[str, Any]:
        """The scale is what the denoiser of dev is told; schnell ignores it."""
        if negative:
            raise UserError("--negative-prompt: a guidance-distilled FLUX.1 pipeline takes none; leave it out")
        return {"guidance_scale": scale}
