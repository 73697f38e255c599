"""Queries, keys and values of one input in one product, each with its LoRA adapter.

    y_i = W_i x + b_i + s_i B_i (A_i x),    i = q, k, v

Computed one by one these are three products with x, forward, three with the gradient, and sums of six gradients of x.
Together they are one product each way: the weights W_i lie one after the other in one tensor, of which each layer has
its part, and so do the A_i for the time of a pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdtune.models.fused_lora import FusedLinear


class JoinedLinear:
    """Layers of one input, with adapters of one rank and as many outputs each, whose weights do not change."""

    def __init__(self, layers: Sequence[FusedLinear]):
        bases: list[Any] = [layer.base_layer for layer in layers]
        self.layers = layers
        self.weight = torch.cat([base.weight.detach() for base in bases])
        self.bias = None if bases[0].bias is None else torch.cat([base.bias.detach() for base in bases])
        for base, part in zip(bases, self.weight.chunk(len(bases)), strict=True):
            base.weight = nn.Parameter(part, requires_grad=False)  # so that the numbers are in memory once

    def fits(self, x: Tensor) -> bool:
        """Whether all layers are in the state, and ``x`` of the kind, for which they are one function.

        Without gradients they are apart: what is drawn on the way is to the bits what the base's own pipeline draws.
        """
        here = x.device == self.weight.device and x.dtype == self.weight.dtype and torch.is_grad_enabled()
        return here and all(layer.is_fused(x) for layer in self.layers)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each layer gives for ``x`` of ``[..., in]``: ``[..., out]``."""
        factors = [factor for layer in self.layers for factor in layer.factors]
        scales = [layer.scale for layer in self.layers]
        y: Tensor = LowRankTogether.apply(x, self.weight, self.bias, scales, *factors)
        return y.unflatten(-1, (len(scales), -1)).unbind(-2)


class LowRankTogether(torch.autograd.Function):
    """``W x + b`` of all layers with ``s_i B_i (A_i x)`` added to the part of each, in ``[..., layers * out]``.

    ``weight`` is ``[layers * out, in]``; ``factors`` are A ``[rank, in]`` and B ``[out, rank]`` of each layer in turn.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Sequence[float], *factors: Tensor
    ) -> Tensor:
        count = len(scales)
        y = functional.linear(x, weight, bias)
        a, flat = torch.cat(factors[::2]), x.reshape(-1, x.shape[-1])
        h = flat @ a.t()
        parts = zip(y.view(-1, len(weight)).chunk(count, -1), h.chunk(count, -1), factors[1::2], scales, strict=True)
        for y_i, h_i, b_i, scale in parts:
            y_i.addmm_(h_i, b_i.t(), alpha=scale)
        ctx.save_for_backward(x, h, weight, a, *factors[1::2])
        ctx.scales = scales
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, weight, a, *bs = ctx.saved_tensors
        count = len(bs)
        g, flat = grad.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        of_h, of_bs = torch.empty_like(h), []
        parts = zip(g.chunk(count, -1), h.chunk(count, -1), of_h.chunk(count, -1), bs, ctx.scales, strict=True)
        for g_i, h_i, of_h_i, b_i, scale in parts:
            of_bs.append(torch.addmm(b_i, g_i.t(), h_i, beta=0, alpha=scale))
            of_h_i.addmm_(g_i, b_i, beta=0, alpha=scale)
        of_as = (of_h.t() @ flat).chunk(count)
        of_x = (g @ weight).addmm_(of_h, a).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, None, *(of for pair in zip(of_as, of_bs, strict=True) for of in pair)


def joined(layers: Sequence[nn.Module]) -> JoinedLinear | None:
    """The layers as one, if they are of such a kind: LoRA of one rank on frozen layers of the same sides."""
    fused = [layer for layer in layers if isinstance(layer, FusedLinear)]
    kinds = {kind_of(layer) for layer in fused}
    return JoinedLinear(fused) if len(fused) == len(layers) and len(kinds) == 1 and None not in kinds else None


def kind_of(layer: FusedLinear) -> tuple[Any, ...] | None:
    """What layers that are joined have in common; none where the weight is in codes, or trains."""
    base: Any = layer.base_layer
    if type(base) is not nn.Linear or base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    return base.weight.shape, base.weight.dtype, base.weight.device, base.bias is None, layer.factors[0].shape
