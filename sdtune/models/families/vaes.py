"""A VAE for runs in half precision whose activations fp16 cannot hold: it computes in fp32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Fp32Mixin:
    """Makes a VAE compute in fp32 whatever the precision around it.

    The activations of some, that of SDXL among them, exceed 65504, which is where fp16 ends.
    """

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with without_autocast(x):
            return super().encode(x.float(), *args, **kwargs)  # type: ignore[misc]

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        with without_autocast(z):
            return super().decode(z.float(), *args, **kwargs)  # type: ignore[misc]


def fp32_vae(kind: type) -> type:
    """The class of a VAE, computing in fp32."""
    return type(f"Fp32{kind.__name__}", (Fp32Mixin, kind), {})


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which autocast is off; it has no switch for tensors on the meta device."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
