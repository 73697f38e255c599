"""LoRA layers that train with fewer operations: the layer and its adapter are one function with its own gradient.

    y = W x + b + s B (A x)

PEFT writes this as seven operations of autograd, with the adapter in float32 inside a base in half precision, so that
each layer casts its input up and A, B and the result down. Here A and B of all layers are cast together, once a forward
pass, and their gradients together, once a backward pass; what the optimizer sees stays float32.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[Tensor, Tensor]


class FusedLinear(lora.Linear):
    """PEFT's layer with one adapter without dropout, on a frozen linear layer; in other states it is PEFT's own.

    ``half`` holds A and B in the precision of the base while a `HalfAdapters` pass lasts.
    """

    half: Pair | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.is_fused(x):
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        base, (a, b), scale = self.base_layer, self.factors, self.scale
        if type(base) is not nn.Linear:  # of codes, which it decodes itself
            return base(x) + functional.linear(functional.linear(x, a), b) * scale  # type: ignore[operator]
        return LowRank.apply(x, x, base.weight, base.bias, a, b, scale)  # type: ignore[no-any-return]

    def is_fused(self, x: Tensor) -> bool:
        """Whether the layer is in the state, and ``x`` of the kind, for which it is one function."""
        plain = not (self.disable_adapters or self.merged or under_autocast(x)) and len(self.active_adapters) == 1
        return plain and x.dtype == self.factors[0].dtype

    @property
    def factors(self) -> Pair:
        """A ``[rank, in]`` and B ``[out, rank]``."""
        name = self.active_adapters[0]
        return self.half or (self.lora_A[name].weight, self.lora_B[name].weight)

    @property
    def scale(self) -> float:
        return self.scaling[self.active_adapters[0]]  # type: ignore[no-any-return]


class LowRank(torch.autograd.Function):
    """``W x + b + s B (A x)``, and its gradients for x, A and B, in matrix products alone.

    In float32 the sums are those of PEFT's layer, in their order, so that equal runs give equal bits. For this ``x`` is
    given twice: autograd adds the gradient by way of the adapter and that by way of the layer one after the other. In
    half precision the products add up inside, where sums are in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        y = functional.linear(x, weight, bias)
        h = functional.linear(x, a)
        if x.dtype == torch.float32:
            y += scaled(functional.linear(h, b), scale)
        else:
            y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.t(), alpha=scale)
        ctx.save_for_backward(x, h, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, weight, a, b = ctx.saved_tensors
        g, flat, h = (t.reshape(-1, t.shape[-1]) for t in (grad, x, h))
        of_x = of_adapter = None
        if grad.dtype == torch.float32:
            scaled_g = g if ctx.scale == 1 else g * ctx.scale
            of_b, of_h = scaled_g.t() @ h, scaled_g @ b
            if ctx.needs_input_grad[0]:
                of_adapter, of_x = (of_h @ a).view(x.shape), (g @ weight).view(x.shape)
        else:
            of_b = torch.addmm(b, g.t(), h, beta=0, alpha=ctx.scale)
            of_h = torch.addmm(h, g, b, beta=0, alpha=ctx.scale)
            if ctx.needs_input_grad[0]:
                of_x = (g @ weight).addmm_(of_h, a).view(x.shape)
        return of_adapter, of_x, None, None, of_h.t() @ flat, of_b, None


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; it has no switch for tensors on the meta device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


class CastTogether(torch.autograd.Function):
    """Tensors in another precision, and their gradients back, each way in one operation on all."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return cast_together(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        made = iter(cast_together([g for g in grads if g is not None], ctx.dtype))
        return None, *(None if g is None else next(made) for g in grads)


def cast_together(tensors: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    given = list(tensors)
    made = [torch.empty_like(t, dtype=dtype) for t in given]
    if made:
        torch._foreach_copy_(made, given)
    return tuple(made)


def fuse_adapters(model: nn.Module) -> None:
    """Have the LoRA layers of ``model`` be `FusedLinear`, where they are of PEFT's plain kind."""
    for layer in model.modules():
        if type(layer) is lora.Linear and is_plain(layer):
            layer.__class__ = FusedLinear


def is_plain(layer: lora.Linear) -> bool:
    """Whether a layer has one adapter, without dropout, a bias of its own or a variant such as DoRA."""
    (name, *others) = layer.lora_A
    dropout = isinstance(layer.lora_dropout[name], nn.Identity)
    bias = layer.lora_B[name].bias is not None
    return not others and dropout and not bias and name not in layer.lora_variant and not layer.fan_in_fan_out


class HalfAdapters:
    """The adapters of a module in half precision, made anew for each step, or each forward pass.

    With them a base in half precision needs no autocast: nothing in it is cast.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.layers = [layer for layer in module.modules() if isinstance(layer, FusedLinear)]
        self.dtype = dtype
        self.factors = [f.weight for layer in self.layers for f in (*layer.lora_A.values(), *layer.lora_B.values())]
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
        self.suffice = trained <= {id(f) for f in self.factors} and all(p.dtype == dtype for p in frozen)
        """Whether nothing else trains, and the rest is in half precision."""

    @property
    def made(self) -> bool:
        """Whether the layers have their factors."""
        return self.layers[0].half is not None

    def make(self) -> None:
        """Give each layer its factors, to be used until `clear`."""
        halves = iter(CastTogether.apply(self.dtype, *self.factors))
        for layer in self.layers:
            layer.half = next(halves), next(halves)

    def clear(self) -> None:
        for layer in self.layers:
            layer.half = None
