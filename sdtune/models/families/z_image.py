"""Z-Image (2025): Qwen3 reads a chat template; a single-stream DiT takes lists of images and of captions.

Its time runs from the noise at 0 to the image at 1, and it predicts the velocity towards the image.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from sdtune.diffusion.objective import Objective
from sdtune.diffusion.rectified_flow import RectifiedFlow
from sdtune.models.families.latent import FLOW_ONLY, LatentFamily
from sdtune.models.families.text import pad, unpad


class ZImage(LatentFamily):
    pipeline_class: ClassVar[Any] = ZImagePipeline
    options: ClassVar[frozenset[str]] = FLOW_ONLY | {"max_sequence_length"}
    max_tokens: ClassVar[int | None] = 512

    def make_objective(self) -> Objective:
        return RectifiedFlow.of(self.cfg, self.cfg, self.scheduler, "uniform", self.patch)

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        return pad(encoded[0])

    def text_shapes(self, captions: int) -> dict[str, Tensor]:
        width, length = self.text_encoder.config.hidden_size, self.sequence_length
        device = self.denoiser.device
        embeds = torch.empty(captions, length, width, device=device, dtype=self.dtype)
        return {"embeds": embeds, "mask": torch.empty(captions, length, device=device, dtype=torch.bool)}

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        embeds = cond["embeds"].to(self.dtype)
        words = unpad(embeds, cond["mask"]) if self.has_values else list(embeds)
        velocities = self.denoiser(list(x_t.to(self.dtype).unsqueeze(2)), 1 - t, words, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)

    @classmethod
    def guidance(cls, scale: float, negative: str) -> dict[str, Any]:
        """The stock call adds ``s (positive - negative)`` to the positive, so that 0 is no guidance."""
        return {"guidance_scale": max(scale - 1, 0.0), "negative_prompt": negative or None}
