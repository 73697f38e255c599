"""Whole tensors of weights of which each process holds a slice, and slices of whole tensors."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sdtune.recipes.recipe import Recipe


def copy_in_main_memory(recipe: Recipe) -> Recipe:
    """A copy whose weights are in the main memory, and were never twice on the device."""
    made: dict[int, Any] = {}
    for tensor in (*recipe.parameters(), *recipe.buffers()):
        copied = tensor.detach().to("cpu", copy=True)
        made[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy(recipe, made)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each process may hold a slice; then every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, place: Tensor) -> Tensor:
    """A full tensor, moved to the device of ``place`` and cut into the same slices."""
    tensor = tensor.to(place.device)
    if isinstance(place, DTensor) and place.shape == tensor.shape:
        return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)
    return tensor
