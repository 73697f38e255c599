"""Exponential moving averages of weights: that of a run, and the targets of distillation."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def own_slice(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; all of it, unless processes hold slices."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def move_average(mean: Iterable[Tensor], live: Iterable[Tensor], decay: float) -> None:
    """``mean <- decay mean + (1 - decay) live``, in place; both in one order, of equal shapes and slices.

    Each process moves its own slices, since the rule is elementwise: asked of the sharded tensors themselves, torch
    works out anew how a list of this length is cut, which takes longer than the sum.
    """
    torch._foreach_lerp_([own_slice(t) for t in mean], [own_slice(t) for t in live], 1 - decay)
