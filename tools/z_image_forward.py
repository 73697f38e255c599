"""A Z-Image transformer's forward pass for a batch of images and captions of one size, for training on few cores.

The stock one takes lists, pads each entry and multiplies complex numbers; this one has the same parameters and output.
It is for captions of at most 32 tokens: the transformer fills them up to 32.
"""

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

CAPTION = 32


def rms(x: Tensor, norm: Any) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings of ``[B, L, H, D]``; ``cos`` and ``sin`` are ``[1, L, 1, D / 2]``."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3)


def run_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor, time: Tensor | None) -> Tensor:
    """One block at ``x`` ``[B, L, D]``; those that refine the caption know no time."""
    attention, feed = block.attention, block.feed_forward
    before, behind, between, beyond = 1.0, 1.0, 1.0, 1.0
    if time is not None:
        scale_a, gate_a, scale_f, gate_f = block.adaLN_modulation[0](time).unsqueeze(1).chunk(4, 2)
        before, behind, between, beyond = 1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()
    h = rms(x, block.attention_norm1) * before
    weights = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    q, k, v = functional.linear(h, weights).view(*x.shape[:2], 3, attention.heads, -1).unbind(2)
    q, k = turned(rms(q, attention.norm_q), cos, sin), turned(rms(k, attention.norm_k), cos, sin)
    h = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + behind * rms(attention.to_out[0](h.transpose(1, 2).flatten(2)), block.attention_norm2)
    h = rms(x, block.ffn_norm1) * between
    a, b = functional.linear(h, torch.cat([feed.w1.weight, feed.w3.weight])).chunk(2, -1)
    return x + beyond * rms(feed.w2(functional.silu(a) * b), block.ffn_norm2)


def rotations(model: ZImageTransformer2DModel, side: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of an image of ``side`` x ``side`` tokens and of a caption."""
    grid = torch.cartesian_prod(torch.tensor([CAPTION + 1]), torch.arange(side), torch.arange(side))
    words = torch.zeros(CAPTION, 3, dtype=torch.long)
    words[:, 0] = torch.arange(1, CAPTION + 1)
    turns = model.rope_embedder(torch.cat([grid, words]))[None, :, None]
    return turns.real.contiguous(), turns.imag.contiguous()


def forward(
    model: ZImageTransformer2DModel, x_t: Tensor, time: Tensor, words: Tensor, known: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """What the stock forward says of ``x_t`` ``[B, C, h, h]``, and the image's tokens after each layer.

    Args:
        time: as the stock one takes it, 1 at the image: ``[B]``.
        words: states of captions, filled up, ``[B, 32, T]``; ``known`` marks those that are words, bool ``[B, 32]``.
    """
    B, C, side = x_t.shape[0], x_t.shape[1], x_t.shape[2] // 2
    n = side * side
    cos, sin = rotations(model, side)
    c = model.t_embedder(time * model.t_scale)
    patches = x_t.view(B, C, side, 2, side, 2).permute(0, 2, 4, 3, 5, 1).reshape(B, n, 4 * C)
    x = model.all_x_embedder["2-1"](patches)
    for block in model.noise_refiner:
        x = run_block(block, x, cos[:, :n], sin[:, :n], c)
    y = torch.where(known[..., None], model.cap_embedder(words), model.cap_pad_token)
    for block in model.context_refiner:
        y = run_block(block, y, cos[:, n:], sin[:, n:], None)
    both, seen = torch.cat([x, y], 1), []
    for block in model.layers:
        both = run_block(block, both, cos, sin, c)
        seen.append(both[:, :n])
    out = model.all_final_layer["2-1"](seen[-1], c=c)
    return out.view(B, side, side, 2, 2, C).permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape), seen
