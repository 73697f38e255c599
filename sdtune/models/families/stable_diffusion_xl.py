"""SDXL (Podell et al. 2023): two CLIP text encoders, and a UNet that is told the sizes of image and crop."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.families.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    pipeline_class: ClassVar[Any] = StableDiffusionXLPipeline
    control_pipelines: ClassVar[dict[str, Any]] = {
        "controlnet": StableDiffusionXLControlNetPipeline,
        "adapter": StableDiffusionXLAdapterPipeline,
    }
    edit_pipeline: ClassVar[Any] = StableDiffusionXLInstructPix2PixPipeline
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

    def inputs(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        added = {"text_embeds": cond["pooled"].to(self.dtype), "time_ids": self.time_ids(cond["size"]).to(self.dtype)}
        return super().inputs(x_t, t, cond) | {"added_cond_kwargs": added}

    def new_t2i_adapter(self, num_res_blocks: int) -> T2IAdapter:
        """diffusers' adapter for SDXL, whose features are added after the first block and inside of the others.

        Raises: UserError for a denoiser of other blocks, which would leave features unread.
        """
        kinds, widths = self.denoiser.config.down_block_types, list(self.denoiser.config.block_out_channels)
        if tuple(kinds) != ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"):
            raise UserError(f"--model {self.cfg.model}: a T2I-Adapter needs the blocks of SDXL, not {', '.join(kinds)}")
        with self.device:
            return T2IAdapter(3, [*widths, widths[-1]], num_res_blocks, 2 * self.downscale, "full_adapter_xl")

    def no_text(self) -> dict[str, Tensor]:
        """Zeros, where the base says so, as the stock pipeline takes them for an absent negative prompt."""
        empty = super().no_text()
        if not self.index.get("force_zeros_for_empty_prompt", True):
            return empty
        return {name: torch.zeros_like(x) for name, x in empty.items()}
