"""The picture of an evaluation as SVG: both sets in a scatter plot, and each figure with its interval."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from sdtune.evaluation.distances import Estimate
from sdtune.run.curves import number, ticks
from sdtune.run.rng import generator

SHOWN = 2000
"""Most points of a set in the scatter plot; more would only cover each other."""
WIDTH, HEIGHT = 1000, 520
LEFT, TOP, SIDE = 40, 56, 420
"""Corner and side of the scatter plot."""
AXIS, LENGTH = 540, 420
"""Left end and length of the figures' axes."""
STYLE = """
svg { font: 13px system-ui, "Segoe UI", sans-serif; background: #fff }
text { fill: #181c22 } .soft { fill: #5b6472; font-size: 12px } .title { font-size: 16px; font-weight: 600 }
.frame { fill: none; stroke: #dfe3e9 } .axis { stroke: #c3c9d2 } .interval { stroke: #1f6feb; stroke-opacity: .45 }
.line { fill: none; stroke: #1f6feb; stroke-opacity: .5 }
.reference { fill: #9aa0a6; fill-opacity: .6 } .samples { fill: #1f6feb; fill-opacity: .6 } .value { fill: #1f6feb }
"""


@dataclass(frozen=True)
class Row:
    """A figure of the picture: its name, what is better of it, and its estimate."""

    name: str
    better: str
    """``higher``, ``lower`` or ``neither``."""
    estimate: Estimate


def draw(x: Tensor, y: Tensor, rows: list[Row], title: str) -> str:
    """SVG of samples x [n, D] and reference y [m, D], projected on the first two principal components of y."""
    body = [f'<text class="title" x="{LEFT}" y="32">{escape(title)}</text>', *_scatter(x, y), *_figures(rows)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>\n' + "\n".join(body) + "\n</svg>\n"
    )


def draw_by_steps(table: Mapping[int, Mapping[str, Mapping[str, Any]]], title: str) -> str:
    """SVG of each figure by number of steps, with its intervals.

    Args:
        table: number of steps to the figures by name, each a dict with ``value``, ``low`` and ``high``.
    """
    names, steps = [*next(iter(table.values()))], sorted(table)
    body = [f'<text class="title" x="{LEFT}" y="32">{escape(title)}</text>']
    width, height = (WIDTH - 2 * LEFT) / 3, 190
    for k, name in enumerate(names):
        left, top = LEFT + width * (k % 3), TOP + 24 + height * (k // 3)
        found = [table[count][name] for count in steps]
        ends = [e[end] for e in found for end in ("value", "low", "high") if e[end] is not None]
        low, span = min(ends), (max(ends) - min(ends)) or 1.0
        across = [left + 60 + (width - 100) * n / max(1, len(steps) - 1) for n in range(len(steps))]

        def up(value: float, low: float = low, span: float = span, top: float = top) -> float:
            return top + 20 + (height - 80) * (1 - (value - low) / span)

        body.append(f'<text x="{left}" y="{top}">{escape(name)} by steps</text>')
        line = " ".join(f"{x:.1f},{up(e['value']):.1f}" for x, e in zip(across, found, strict=True))
        body.append(f'<polyline class="line" points="{line}"/>')
        for x, count, e in zip(across, steps, found, strict=True):
            if e["low"] is not None:
                interval = f"M{x:.1f} {up(e['low']):.1f}V{up(e['high']):.1f}"
                body.append(f'<path class="interval" stroke-width="4" d="{interval}"/>')
            body.append(f'<circle class="value" cx="{x:.1f}" cy="{up(e["value"]):.1f}" r="4"/>')
            body.append(f'<text x="{x + 7:.1f}" y="{up(e["value"]) - 6:.1f}">{number(e["value"])}</text>')
            place = f'x="{x:.1f}" y="{top + height - 42:.1f}"'
            body.append(f'<text class="soft" {place} text-anchor="middle">{count}</text>')
    total = TOP + 24 + height * math.ceil(len(names) / 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _scatter(x: Tensor, y: Tensor) -> Iterator[str]:
    mean = y.mean(0)
    directions = torch.linalg.svd(y - mean, full_matrices=False).Vh[:2].T
    sets = {"reference": (y - mean) @ directions, "samples": (x - mean) @ directions}
    both = torch.cat([*sets.values()])
    low, high = both.min(0).values, both.max(0).values
    span = (high - low).clamp(min=1e-12)
    yield f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" rx="6"/>'
    for name, points in sets.items():
        some = points[torch.randperm(len(points), generator=generator(0, "scatter"))[:SHOWN]]
        places = ((some - low) / span * (SIDE - 24) + 12).tolist()
        dots = "".join(f'<circle cx="{LEFT + a:.1f}" cy="{TOP + SIDE - b:.1f}" r="2.2"/>' for a, b in places)
        yield f'<g class="{name}">{dots}</g>'
    bottom = TOP + SIDE
    for k, (name, points) in enumerate(sets.items()):
        at = LEFT + 130 * k
        yield f'<circle class="{name}" cx="{at + 6}" cy="{bottom + 18}" r="5"/>'
        yield f'<text x="{at + 18}" y="{bottom + 22}">{name} ({len(points)})</text>'
    axes = "across, up: first and second principal component of the reference"
    yield f'<text class="soft" x="{LEFT}" y="{bottom + 40}">{axes}</text>'


def _figures(rows: list[Row]) -> Iterator[str]:
    """A line for each figure: its name and value, and an axis with the interval and the value on it."""
    height = min(90, SIDE / max(1, len(rows)))
    for k, row in enumerate(rows):
        e, top = row.estimate, TOP + height * k
        ends = [e.value if end is None else end for end in (e.low, e.high)]
        low, high = min(*ends, e.value), max(*ends, e.value)
        margin = 0.3 * (high - low) or 0.1 * abs(e.value) or 1.0
        low, high = low - margin, high + margin

        def at(value: float, low: float = low, high: float = high) -> float:
            return AXIS + LENGTH * (value - low) / (high - low)

        better = "" if row.better == "neither" else f" ({row.better} is better)"
        yield f'<text x="{AXIS}" y="{top + 14:.1f}">{escape(row.name)}: {e.value:.4g}{better}</text>'
        line = top + 32
        yield f'<path class="axis" d="M{AXIS} {line + 8:.1f}h{LENGTH}"/>'
        for tick in ticks(low, high):
            place = f'x="{at(tick):.1f}" y="{line + 24:.1f}"'
            yield f'<path class="axis" d="M{at(tick):.1f} {line + 8:.1f}v4"/>'
            yield f'<text class="soft" {place} text-anchor="middle">{number(tick)}</text>'
        if e.low is not None and e.high is not None:
            interval = f"M{at(e.low):.1f} {line:.1f}H{at(e.high):.1f}"
            yield f'<path class="interval" stroke-width="4" d="{interval}"/>'
        yield f'<circle class="value" cx="{at(e.value):.1f}" cy="{line:.1f}" r="5"/>'
