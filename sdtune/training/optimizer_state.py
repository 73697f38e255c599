"""An optimizer's state as tensors and numbers that files hold, and back."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sdtune.training.optim import eager, set_rate
from sdtune.training.slices import shard_like


def save_state(optimizer: Optimizer, names: dict[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors, and numbers that JSON holds, under the names of the parameters.

    No two tensors share memory, which bitsandbytes' tables and Prodigy's sums do: a safetensors file cannot hold that.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    numbers: dict[str, Any] = {"state": {}, "groups": []}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        for key, value in entries(state):
            if isinstance(value, Tensor):
                for part, inner in parts_of(value).items():
                    place = id(inner) if isinstance(inner, DTensor) else inner.data_ptr()
                    tensors[f"{name}|{key}{part}"] = inner.detach().clone() if place in seen else inner.detach()
                    seen.add(place)
            else:
                numbers["state"].setdefault(name, {})[key] = value
    for group in optimizer.param_groups:  # Prodigy and Schedule-Free keep counters there
        own = {k: v for k, v in group.items() if k != "params" and isinstance(v, bool | int | float)}
        held = {k: v for k, v in group.items() if k != "params" and isinstance(v, Tensor)}
        for key, value in held.items():
            shared = value.data_ptr() in seen
            tensors[f"|{len(numbers['groups'])}|{key}"] = value.detach().clone() if shared else value.detach()
            seen.add(value.data_ptr())
        numbers["groups"].append(own)
    return tensors, numbers


def entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The state of a weight; a list of tensors, such as SOAP has, as itself with gaps and each tensor by its place.

    A matrix that lies in memory by columns is given transposed, ``[0]T``: a product with it rounds by how it lies.
    """
    for key, value in state.items():
        if isinstance(value, list):
            yield key, [None if isinstance(item, Tensor) else item for item in value]
            for k, item in enumerate(value):
                if isinstance(item, Tensor):
                    by_columns = item.ndim == 2 and not item.is_contiguous()
                    yield (f"{key}[{k}]T", item.mT) if by_columns else (f"{key}[{k}]", item)
        else:
            yield key, value


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """A tensor as plain ones: itself, or of one that is made of others (codes and scales) each by ``|name``."""
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return {"": tensor}
    return {f"|{name}": getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


@torch.no_grad()
def init_state(optimizer: Optimizer) -> None:
    """Have an optimizer make its state for every weight, by a step at a rate of 0, which moves none."""
    for group in optimizer.param_groups:
        set_rate(group, 0.0)
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    with eager(optimizer.param_groups[0]["params"][0].device):
        optimizer.step()
    optimizer.zero_grad()


def load_state(
    optimizer: Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Put back what ``save_state`` gave, each tensor on the device and in the slices of its parameter."""
    paged = bool(getattr(optimizer, "is_paged", False))
    if paged or any(name and len(rest) == 2 for name, *rest in (key.split("|") for key in tensors)):
        init_state(optimizer)  # it alone knows how to put codes and scales together, or to have pages
    by_name = {name: parameter for parameter, name in names.items()}
    for name, state in numbers["state"].items():
        optimizer.state[by_name[name]].update(state)
    for key, value in tensors.items():
        name, *rest = key.split("|")
        if not name:
            optimizer.param_groups[int(rest[0])][rest[1]] = value
            continue
        parameter = by_name[name]
        if len(rest) == 2:
            getattr(optimizer.state[parameter][rest[0]], rest[1]).copy_(value)
            continue
        if place := re.fullmatch(r"(.+)\[(\d+)\](T?)", rest[0]):
            there = shard_like(value, parameter)
            optimizer.state[parameter][place[1]][int(place[2])] = there.mT if place[3] else there
            continue
        if paged and isinstance(there := optimizer.state[parameter].get(rest[0]), Tensor):
            there.copy_(value)
            continue
        on_host = rest[0] == "step" and not optimizer.param_groups[0].get("fused")
        optimizer.state[parameter][rest[0]] = value if on_host else shard_like(value, parameter)
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update(saved)
