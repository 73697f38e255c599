"""Chroma (2025): FLUX.1's latents and blocks, T5 alone under a mask, and true guidance with a negative prompt."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ChromaPipeline
from torch import Tensor

from sdtune.models.families.flux import Flux
from sdtune.models.families.latent import FLOW_ONLY, LatentFamily


class Chroma(Flux):
    pipeline_class: ClassVar[Any] = ChromaPipeline
    control_pipelines: ClassVar[dict[str, Any]] = {}
    encoders: tuple[str, ...] = ("text_encoder",)
    trainable_encoders: ClassVar[tuple[str, ...]] = ()
    # The layer that makes the modulations was distilled: it stays as it is
    lora_targets: ClassVar[tuple[str, ...]] = LatentFamily.lora_targets
    options: ClassVar[frozenset[str]] = FLOW_ONLY | {"max_sequence_length"}
    encode_options: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False}

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        embeds, _, mask = encoded[:3]
        return {"embeds": embeds, "mask": mask}

    def text_shapes(self, captions: int) -> dict[str, Tensor]:
        shape, device = (captions, self.sequence_length, self.text_encoder.config.d_model), self.denoiser.device
        embeds = torch.empty(shape, device=device, dtype=self.dtype)
        return {"embeds": embeds, "mask": torch.empty(shape[:2], device=device, dtype=torch.bool)}

    def denoiser_inputs(self, x_t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        of_image = torch.ones(len(x_t), x_t[0, 0].numel() // self.patch**2, device=x_t.device, dtype=self.dtype)
        return {"attention_mask": torch.cat([cond["mask"].to(self.dtype), of_image], dim=1)}

    @classmethod
    def guidance(cls, scale: float, negative: str) -> dict[str, Any]:
        return {"guidance_scale": scale, "negative_prompt": negative or None}
