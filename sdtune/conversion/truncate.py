"""Reduces changes of weights to a smaller rank, and extracts the difference of two models as an adapter."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.config.verbs import MergeConfig
from sdtune.conversion.fold import Base, open_base
from sdtune.conversion.lowrank import Spectrum, decompose
from sdtune.models.formats import Module


@dataclass
class Tally:
    """Squared norms of a part's change, wanted and retained, and the ranks of its modules."""

    wanted: float
    retained: float
    ranks: list[int]

    def __str__(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        share = f"energy {self.retained / self.wanted:.6f} retained" if self.wanted else "no change"
        return f"{share}, {len(self.ranks)} modules of rank {low if low == high else f'{low} to {high}'}"


def lora_module(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> Module:
    """A module with ``up`` (out, r) and ``down`` (r, in * k * k) in the layout of a weight of ``shape``."""
    rank = len(down)
    tensors = {"up": up.reshape(-1, rank, *[1] * (len(shape) - 2)), "down": down.reshape(rank, *shape[1:])}
    return Module("lora", {k: v.contiguous() for k, v in tensors.items()}, float(rank), rank)


def truncate_all(
    cfg: MergeConfig, spectra: Iterable[tuple[tuple[str, str], Spectrum, tuple[int, ...]]]
) -> tuple[dict[tuple[str, str], Module], list[str]]:
    """Modules of the rank that ``cfg`` asks for, and a line for each part and for all parts."""
    modules, tallies = {}, {}
    for (part, name), spectrum, shape in spectra:
        rank = spectrum.rank(cfg.rank, cfg.energy)
        if not rank:
            continue
        modules[part, name] = lora_module(*spectrum.factors(rank), shape)
        tally = tallies.setdefault(part, Tally(0.0, 0.0, []))
        tally.wanted += spectrum.energy(len(spectrum.s))
        tally.retained += spectrum.energy(rank)
        tally.ranks.append(rank)
    if len(tallies) > 1:
        both = list(tallies.values())
        ranks = [rank for tally in both for rank in tally.ranks]
        tallies["all"] = Tally(sum(t.wanted for t in both), sum(t.retained for t in both), ranks)
    return modules, [f"{part}: {tally}" for part, tally in tallies.items()]


def extract(cfg: MergeConfig, base: Base) -> tuple[dict[tuple[str, str], Module], list[str]]:
    """``tuned - base`` of every changed linear and convolution layer at a smaller rank, and lines that report on it."""
    assert cfg.tuned is not None
    tuned = open_base(cfg, cfg.tuned, flag="--tuned")
    layers, others = base.modules, tuned.modules
    for key in sorted(layers.keys() | others.keys()):
        one, other = (side[key].weight.shape if key in side else None for side in (layers, others))
        if one != other:
            shapes = ("no such layer" if s is None else "x".join(map(str, s)) for s in (one, other))
            raise UserError(
                f"--tuned {cfg.tuned}: {'.'.join(key)} is {' in the base, '.join(shapes)} in it: "
                "they are different kinds of model"
            )

    def spectra() -> Iterator[tuple[tuple[str, str], Spectrum, tuple[int, ...]]]:
        moved = [k for k in sorted(layers) if differs(layers[k].weight, others[k].weight)]
        for key in bar(moved, "Decomposing"):
            one, other = base.weight(key), tuned.weight(key)
            yield key, decompose(other.double() - one.double()), tuple(one.shape)

    modules, lines = truncate_all(cfg, spectra())
    rest, tuned_rest = base.rest, tuned.rest
    lost = [k for k in rest if k not in tuned_rest or differs(rest[k], tuned_rest[k])]
    if lost:
        lines.append(f"left out: {len(lost)} changed tensors that an adapter cannot hold, such as {lost[0]}")
    if not modules:
        raise UserError(
            f"--tuned {cfg.tuned}: its linear and convolution layers are equal to those of --model {cfg.model}"
        )
    return modules, lines


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether two weights differ by more than the rounding of one of them to 16 bits."""
    if a.shape != b.shape:
        return True
    if torch.equal(a, b):
        return False
    for half in (torch.float16, torch.bfloat16):
        short_a, short_b = a.to(half), b.to(half)
        stored = torch.equal(short_a.to(a.dtype), a) or torch.equal(short_b.to(b.dtype), b)
        if stored and torch.equal(short_a, short_b):
            return False
    return True


def bar(items: Iterable[Any], what: str) -> Iterable[Any]:
    """``items`` with a progress bar on a terminal: the layers of a full-size model take minutes."""
    items = list(items)
    return track(items, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
