"""Qwen-Image (2025): Qwen2.5-VL reads a template, a VAE of videos, packed latents of 16 channels."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from sdtune.diffusion.objective import Objective
from sdtune.diffusion.rectified_flow import RectifiedFlow
from sdtune.diffusion.tables import Table
from sdtune.models.families.latent import FLOW_ONLY, LatentFamily, pack, unpack


class QwenImage(LatentFamily):
    pipeline_class: ClassVar[Any] = QwenImagePipeline
    options: ClassVar[frozenset[str]] = FLOW_ONLY | {"max_sequence_length"}
    encode_options: ClassVar[dict[str, Any]] = {}
    of_videos: ClassVar[bool] = True
    max_tokens: ClassVar[int | None] = 512

    def unused_layers(self, part: str) -> str | None:
        """The text that the last block gives is not read."""
        if part != self.denoiser_name:
            return None
        last = self.denoiser.config.num_layers - 1
        return rf"transformer_blocks\.{last}\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)"

    def make_objective(self) -> Objective:
        return RectifiedFlow.of(self.cfg, self.cfg, self.scheduler, "uniform", self.patch)

    @property
    def latent_channels(self) -> int:
        return self.vae_config["z_dim"]

    @property
    def downscale(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])

    def normalise(self, z: Tensor) -> Tensor:
        mean, std = (table.on(z.device, z.dtype) for table in self.statistics)
        return (z - mean) / std

    @cached_property
    def statistics(self) -> list[Table]:
        """Mean and deviation of each channel, ``[C, 1, 1]``."""
        return [Table(torch.tensor(self.vae_config[f"latents_{name}"])[:, None, None]) for name in ("mean", "std")]

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        embeds, mask = encoded  # no mask where it would be full
        full = torch.ones(embeds.shape[:2], device=embeds.device)
        return {"embeds": embeds, "mask": (full if mask is None else mask).bool()}

    def text_shapes(self, captions: int) -> dict[str, Tensor]:
        width, device = self.text_encoder.config.get_text_config().hidden_size, self.denoiser.device
        embeds = torch.empty(captions, self.sequence_length, width, device=device, dtype=self.dtype)
        return {"embeds": embeds, "mask": torch.empty(embeds.shape[:2], device=device, dtype=torch.bool)}

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        x_t = x_t.to(self.dtype)
        shape = (1, x_t.shape[-2] // self.patch, x_t.shape[-1] // self.patch)
        velocity = self.denoiser(
            hidden_states=pack(x_t),
            timestep=t,
            encoder_hidden_states=cond["embeds"].to(self.dtype),
            encoder_hidden_states_mask=cond["mask"],
            img_shapes=[[shape]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(velocity, x_t)

    @classmethod
    def guidance(cls, scale: float, negative: str) -> dict[str, Any]:
        """Without a negative prompt the stock call would not guide; a blank is what its authors give."""
        return {"true_cfg_scale": scale, "negative_prompt": negative or " "}
