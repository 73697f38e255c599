"""Inpainting models of Stable Diffusion: the UNet is told a hole, and the picture around it, in further channels."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sdtune.models.families.unet import UNetFamily


class Inpaints(UNetFamily):
    paints_holes: ClassVar[bool] = True
    control_pipelines: ClassVar[dict[str, Any]] = {}
    edit_pipeline: ClassVar[Any] = None

    @property
    def input_channels(self) -> int:
        """The noised latent, the hole, and the latent of what is kept."""
        return 2 * self.latent_channels + 1

    def conditioning(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """With ``hole`` ``[B, 1 + C, h, w]``: 1 where to paint, and the latent of the picture without the hole.

        Args:
            batch: has ``hole`` ``[B, 1, H, W]`` and ``kept`` ``[B, 3, H, W]``, the picture with 0 in the hole.
        """
        kept = self.normalise(self.source_latents(batch["kept"]))
        hole = functional.interpolate(batch["hole"].to(kept), size=kept.shape[-2:])
        return super().conditioning(batch) | {"hole": torch.cat([hole, kept], 1)}

    def inputs(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        return super().inputs(torch.cat([x_t, cond["hole"].to(x_t)], 1), t, cond)
