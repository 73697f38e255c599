"""Layers that keep less of the forward pass for the backward pass, or compute it faster.

What keeps less has the results and gradients of diffusers' layers to the bit. `by_product` has them to the last bits.

Autograd keeps what an operation's gradient may need, whether or not it is asked for: a convolution keeps its input for
the gradient of its weight, though the weight is frozen; an activation keeps its input, though that can be had from what
the norm before it keeps. Of a residual block with frozen weights three tensors of five go so, of a gated layer one of
three. What is computed again is element-wise, and takes a hundredth of the time of the convolutions around it.
"""

import math
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

from sdtune.models.fused_lora import under_autocast
from sdtune.models.joined_lora import JoinedLinear, joined

LARGE = 2**18
"""Numbers of a tensor from which on it is worth while not to keep it: a function of Python's own costs 50 us."""


LARGE_WEIGHT = {torch.float32: 2**22, torch.bfloat16: 2**20}
"""Numbers of a weight from which on a convolution with few places is one product on a CPU, by their kind."""
FEW_PLACES = 512
"""Places of all images up to which it is."""


class LeanConv2d(nn.Conv2d):
    """A convolution that keeps no input while its weight is frozen and nothing is cast, and is fast with few places."""

    def forward(self, x: Tensor) -> Tensor:
        if self.is_product(x):
            return by_product(self, x)
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if x.numel() < LARGE or trains or self.padding_mode != "zeros" or under_autocast(x):
            return super().forward(x)
        how = (self.stride, self.padding, self.dilation, self.groups)
        return FrozenConvolution.apply(x, self.weight, self.bias, how)  # type: ignore[no-any-return]

    def is_product(self, x: Tensor) -> bool:
        """Whether `by_product` is faster: on a CPU, with a large weight and few places.

        Without gradients it is not, so that what is drawn on the way is to the bits what the base's own pipeline draws.
        """
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return False
        if self.weight.numel() < LARGE_WEIGHT.get(x.dtype, math.inf):
            return False
        places = x.shape[0] * x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        usual = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        return usual and places <= FEW_PLACES and not isinstance(self.padding, str) and not under_autocast(x)


def by_product(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of ``[B, C, H, W]`` as a product of its weight, as it lies, with the places that it sees.

    oneDNN puts a weight in another order at each call, forward and back, which takes longer than the convolution where
    59 MB of weight meet 64 places.
    """
    size: tuple[int, ...] = layer.kernel_size
    return torch.ops.aten.thnn_conv2d(x, layer.weight, size, layer.bias, layer.stride, layer.padding)  # type: ignore[no-any-return]


class FrozenConvolution(torch.autograd.Function):
    """A convolution with the gradient of x alone, which needs the shape of x and not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        return functional.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.how), None, None, None  # type: ignore[no-untyped-call]


class LeanResnetBlock(ResnetBlock2D):
    """The block of diffusers whose norms keep what their activations need, and which does not divide by one."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or under_autocast(input_tensor):
            result: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return result
        h = self.conv1(activated(self.norm1, input_tensor))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        h = activated(self.norm2, h)
        h = self.conv2(self.dropout(h) if self.dropout.p else h)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
        h = input_tensor + h
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """``silu(norm(x))`` of ``[B, C, H, W]``."""
    if x.numel() < LARGE or norm.weight.requires_grad:
        return functional.silu(norm(x))
    x = x.contiguous()  # a norm reads its channels one after the other
    return NormActivation.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)  # type: ignore[no-any-return]


class NormActivation(torch.autograd.Function):
    """``silu(group_norm(x))``, of which x is kept, and not the norm's result as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.shape = *x.shape[:2], x.shape[2] * x.shape[3], groups
        normed, mean, rstd = torch.native_group_norm(x, weight, bias, *ctx.shape, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return functional.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        normed = torch.native_group_norm(x, weight, bias, *ctx.shape, ctx.eps)[0]
        grad = torch.ops.aten.silu_backward(grad, normed)
        wanted = ctx.needs_input_grad[:3]
        of = torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, weight, *ctx.shape, wanted)
        return *of, None, None


class LeanGEGLU(GEGLU):
    """The gated layer of diffusers, which keeps what it projects, and not what its gate becomes as well."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projected = self.proj(hidden_states)
        if projected.numel() < LARGE:
            h, gate = projected.chunk(2, dim=-1)
            return h * functional.gelu(gate)
        return GatedGelu.apply(projected)  # type: ignore[no-any-return]


class GatedGelu(torch.autograd.Function):
    """``h gelu(g)`` of ``[..., 2 D]``, whose halves are h and g (Shazeer 2020, equation 6)."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        h, gate = projected.chunk(2, dim=-1)
        return h * functional.gelu(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (projected,) = ctx.saved_tensors
        h, gate = projected.chunk(2, dim=-1)
        of = torch.empty_like(projected)
        of_h, of_gate = of.chunk(2, dim=-1)
        torch.mul(grad, functional.gelu(gate), out=of_h)
        of_gate.copy_(torch.ops.aten.gelu_backward(grad * h, gate))
        return of


class LeanAttention(Attention):
    """The attention of diffusers as its usual processor computes it, without looking for what other kinds would need.

    The processor's signature is not read, which takes a tenth of the time of a small one, and nothing is divided by 1.
    """

    joined: JoinedLinear | None = None
    """Queries, keys and values in one, or keys and values of an attention to something else."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        usual = attention_mask is None and hidden_states.ndim == 3 and type(self.processor) is AttnProcessor2_0
        if kwargs or not usual:
            given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, **kwargs}
            result: Tensor = super().forward(hidden_states, **given)
            return result
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in self.projected(hidden_states, context)
        )
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out, dropout = self.to_out
        found: Tensor = out(seen)
        return dropout(found) if dropout.p else found

    def projected(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Queries of ``x``, keys and values of ``context``."""
        if self.joined is None or not self.joined.fits(context) or (self.joins_queries and x is not context):
            return self.to_q(x), self.to_k(context), self.to_v(context)
        return self.joined(x) if self.joins_queries else (self.to_q(x), *self.joined(context))

    @property
    def joins_queries(self) -> bool:
        return not self.is_cross_attention

    def join(self) -> None:
        """From now on compute in one product what has the same input, if the adapters are of such a kind."""
        queries = [self.to_q] if self.joins_queries else []
        self.joined = joined([*queries, self.to_k, self.to_v])


def keep_less(model: nn.Module) -> None:
    """Have the layers of ``model`` that keep more than they need be of the classes here."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = LeanConv2d
        elif type(layer) is GEGLU:
            layer.__class__ = LeanGEGLU
        elif type(layer) is Attention and is_plain(layer):
            layer.__class__ = LeanAttention
        elif type(layer) is ResnetBlock2D and is_common(layer):
            layer.__class__ = LeanResnetBlock


def join_projections(model: nn.Module) -> None:
    """Have each attention of ``model`` that `keep_less` knew join what it projects."""
    for layer in model.modules():
        if isinstance(layer, LeanAttention):
            layer.join()


def is_common(block: ResnetBlock2D) -> bool:
    """Whether a residual block keeps its side, adds the time to what it has, and has SiLU as its activation."""
    adds = block.time_emb_proj is None or block.time_embedding_norm == "default"
    return adds and not (block.up or block.down) and isinstance(block.nonlinearity, nn.SiLU)


def is_plain(attention: Attention) -> bool:
    """Whether an attention has no norms, no residual, and no scale of what it gives."""
    norms = (attention.group_norm, attention.spatial_norm, attention.norm_cross, attention.norm_q, attention.norm_k)
    more = attention.residual_connection or attention.pre_only or attention.rescale_output_factor != 1
    return not more and all(norm is None for norm in norms)
