"""SDXL (Podell et al. 2023): two CLIP text encoders, and a UNet that is told the sizes of image and crop."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from sdtune.models.families.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    pipeline_class: ClassVar[Any] = StableDiffusionXLPipeline
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    trainable_encoders: ClassVar[tuple[str, ...]] = encoders
    word_encoders: ClassVar[tuple[str, ...]] = encoders
    conditions_on_size = True
    clip_layer: ClassVar[int | None] = 2

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        embeds, _, pooled, _ = encoded
        return {"embeds": embeds, "pooled": pooled}

    @classmethod
    def window_tensors(cls, outputs: Sequence[Any]) -> dict[str, Tensor]:
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"embeds": embeds, "pooled": outputs[-1].text_embeds}

    def unused_layers(self, part: str) -> str | None:
        """The states before the last layer are read of both encoders, and the pooled output of the second alone."""
        if part != "text_encoder":
            return None
        last = self.part(part).config.num_hidden_layers - 1
        return rf".*(layers\.{last}\.|final_layer_norm)"

    def time_ids(self, size: Tensor) -> Tensor:
        """What the denoiser is told of sizes, from ``size`` ``[B, 6]``: those of the image, its crop and the target."""
        return size

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        dtype = self.dtype
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": self.time_ids(cond["size"]).to(dtype)}
        text = {"encoder_hidden_states": cond["embeds"].to(dtype), "encoder_attention_mask": cond.get("mask")}
        return self.denoiser(x_t.to(dtype), t, added_cond_kwargs=added, **text).sample
