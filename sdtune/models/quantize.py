"""A frozen base in fewer bits, beside adapters in 32 (QLoRA; Dettmers et al. 2023).

The weights of linear layers are stored as codes with scales, and dequantised each time that they are used, so the
gradient flows through them to the adapters. Convolutions stay as they are: neither library quantises them.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdtune.config.sections import UserError

LIBRARIES = {"int8": ("torchao", "torchao"), "nf4": ("bitsandbytes", "bnb")}
"""What makes the codes of a kind, and the extra of sdtune that installs it."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose ``weight`` holds codes; ``decode()`` gives the numbers that they stand for.

    The libraries' own layers are not used: torchao's keeps each decoded weight for the backward pass, and that of
    bitsandbytes rewrites its codes on a CPU whenever it is evaluated.
    """

    codes: list[Tensor]
    """The weight and what belongs to it."""
    decode: Callable[[], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return DequantizedMatmul.apply(x, self.decode, self.bias)


class DequantizedMatmul(torch.autograd.Function):
    """``x W^T + b`` and its gradient for ``x``, with ``W`` decoded anew for each of the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.decode, ctx.dtype = decode, x.dtype
        return nn.functional.linear(x, decode(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad @ ctx.decode().to(grad.dtype)).to(ctx.dtype), None, None


@torch.no_grad()
def quantize(model: nn.Module, kind: str, device: torch.device | None = None) -> None:
    """Quantise the frozen weights of the linear layers of ``model`` in place.

    Args:
        device: where the codes go; a layer at a time is there in full. ``None`` for that of the weights.
        kind: ``int8``, with a scale for each row, or ``nf4``, with one for each 64 weights, itself in 8 bits.

    Raises:
        UserError: the library is not there.
    """
    require(kind)
    encode = {"int8": int8, "nf4": nf4}[kind]
    for layer in model.modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            layer.codes, layer.decode = encode(layer.weight.detach().to(device or layer.weight.device))
            layer.weight = nn.Parameter(layer.codes[0], requires_grad=False)
            layer.__class__ = QuantizedLinear


def require(kind: str) -> None:
    """Raises: UserError where the library that makes the codes is not there."""
    library, extra = LIBRARIES[kind]
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise UserError(f"--quantize-base {kind}: {error}; pip install 'sdtune[{extra}]'") from None


def int8(weight: Tensor) -> tuple[list[Tensor], Callable[[], Tensor]]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig())
    coded: Any = layer.weight.detach()
    return [coded.qdata, coded.scale], coded.dequantize


def nf4(weight: Tensor) -> tuple[list[Tensor], Callable[[], Tensor]]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    coded, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    tables = [state.absmax, state.code, state.state2.absmax, state.state2.code]
    return [coded, *tables], lambda: dequantize_4bit(coded, state)


def sizes(model: nn.Module, kind: str) -> tuple[int, int, int]:
    """Bytes of the weights that `quantize` quantises, of their codes, and of the largest weight, dequantised."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    plain = [w.nbytes for w in weights]
    return sum(plain), round(sum(code_bytes(w, kind) for w in weights)), max(plain)


def code_bytes(weight: Tensor, kind: str) -> float:
    """Bytes of the codes of a weight with what belongs to them, as the libraries keep them."""
    if kind == "int8":
        return weight.numel() + 4 * len(weight)  # a scale for each row
    # half a byte, a scale in 8 bits for each 64, its own in 32 for each 256 of these; the tables of both codes
    return weight.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 4 * (16 + 256)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of ``model``, of codes with their scales."""
    coded = [t for m in model.modules() if isinstance(m, QuantizedLinear) for t in m.codes[1:]]
    return sum(t.nbytes for t in (*model.parameters(), *coded))
