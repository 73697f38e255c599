"""What two runs have in common: their tensors, to the bit or nearly."""

from pathlib import Path

import torch
from torch import Tensor

from sdtune.run import checkpoints
from tests.contract import RECIPES


def tensors_of(out: Path, recipe: str = "lora") -> dict[str, Tensor]:
    """All that the last checkpoint of a run holds, and its artefact."""
    groups, _ = checkpoints.load(checkpoints.found(out / "checkpoints")[-1])
    flat = {f"{group}.{name}": t for group, named in groups.items() for name, t in named.items()}
    return flat | RECIPES[recipe].artefact(out)


def assert_same_bits(one: Path, other: Path, recipe: str = "lora") -> None:
    """Two runs ended with the same checkpoint and the same artefact, bit by bit."""
    left, right = tensors_of(one, recipe), tensors_of(other, recipe)
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two numbers of the same tensors."""
    assert one.keys() == other.keys()
    return max((one[k] - other[k]).abs().max().item() for k in one)


def mean_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The mean difference between the numbers of the same tensors."""
    assert one.keys() == other.keys()
    return torch.cat([(one[k] - other[k]).abs().flatten() for k in one]).mean().item()
