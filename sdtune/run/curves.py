"""Curves of a report: lines in an SVG that stretches with the plot, labels in HTML so that text keeps its size."""

import json
import math
from collections.abc import Sequence
from html import escape

MOST_POINTS = 600  # of a curve; a screen does not show more

Points = list[tuple[int, float]]  # (optimizer step, value)


def chart(title: str, unit: str, series: dict[str, Points], from_zero: bool = True) -> str:
    """A ``figure`` with the curves of ``series``, by name; ``logged`` and the ends of an interval, ``low`` and
    ``high``, are drawn faint, ``holdout`` with dots.

    At least one must have a point. ``data-points`` holds the values that the page's script shows at the pointer.
    """
    series = {name: points for name, points in series.items() if points}
    steps = [step for points in series.values() for step, _ in points]
    x0, x1 = min(steps), max(steps)
    x1 += x1 == x0
    y0, y1 = _range([value for points in series.values() for _, value in points], from_zero)
    x_ticks, y_ticks = ticks(x0, x1, whole=True), ticks(y0, y1)

    def place(points: Sequence[tuple[float, float]]) -> str:
        return "L".join(f"{(x - x0) / (x1 - x0) * 1000:.1f} {(y1 - y) / (y1 - y0) * 1000:.1f}" for x, y in points)

    paths = "".join(f'<path class="lines" d="M0 {(y1 - y) / (y1 - y0) * 1000:.1f}H1000"/>' for y in y_ticks)
    keys, classes = "", {"logged": "faint", "low": "faint", "high": "faint", "holdout": "second"}
    if not series.keys() & classes.keys() and len(series) > 1:  # several of one kind, each in a colour of its own
        classes = {name: f"run{k % 6}" for k, name in enumerate(series)}
    # The faint ones are drawn first, below the others
    for name, points in sorted(series.items(), key=lambda s: classes.get(s[0]) != "faint"):
        d = place(thin(points))
        paths += f'<path class="{classes.get(name, "main")}" d="M{d}"/>'
        if name == "holdout" or len(points) == 1:  # a line of no length with round ends is a dot
            dots = "".join(f"M{p}h0" for p in d.split("L"))
            paths += f'<path class="{"dots" if name == "holdout" else "main"}" d="{dots}"/>'
        keys += f'<span class="key {classes.get(name, "")}">{escape(name)}</span>' if len(series) > 1 else ""
    labels = "".join(
        f'<span class="y" style="top:{(y1 - y) / (y1 - y0) * 100:.2f}%">{number(y)}</span>' for y in y_ticks
    ) + "".join(f'<span class="x" style="left:{(x - x0) / (x1 - x0) * 100:.2f}%">{number(x)}</span>' for x in x_ticks)
    first = next(iter(series.values()))
    summary = f"{title}: {first[0][1]:.4g} at step {first[0][0]}, {first[-1][1]:.4g} at step {first[-1][0]}"
    shown = {name: [(x, float(f"{y:.4g}")) for x, y in thin(points)] for name, points in series.items()}
    data = escape(json.dumps({"x": [x0, x1], "series": shown}, separators=(",", ":")))
    return (
        f'<figure class="chart card{" first" if title == "Loss" else ""}" data-points="{data}">'
        f'<figcaption><h3>{title}</h3><span>{unit}</span>{keys}</figcaption><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(summary)}">'
        f'{paths}</svg>{labels}<span class="unit">optimizer step</span></div></figure>'
    )


def smooth(points: Points) -> Points:
    """Moving average over a twentieth of the curve, over fewer points at its ends."""
    half = max(1, len(points) // 40)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    out = []
    for k, (step, _) in enumerate(points):
        reach = min(half, k, len(points) - 1 - k)
        out.append((step, (sums[k + reach + 1] - sums[k - reach]) / (2 * reach + 1)))
    return out


def thin(points: Points) -> Points:
    """At most `MOST_POINTS` of ``points``: the smallest and largest of each stretch, so that every spike stays."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    thinned: Points = []
    for k in range(0, len(points), size):
        stretch = points[k : k + size]
        thinned += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return thinned


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round numbers from ``low`` to ``high``."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    step = max(1.0, step) if whole else step
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number in its short form: 12,000, 0.05, 1e-4."""
    if value and abs(value) <= 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{float(f'{value:.6g}'):g}"


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, or hours: 4:05, 1:00:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _range(values: list[float], from_zero: bool) -> tuple[float, float]:
    """Lower and upper end of an axis. Of 100 values or more, the outermost hundredth on each side may lie outside."""
    values = sorted(values)
    outside = len(values) // 100
    low, high = values[outside], values[-1 - outside]
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if low >= 0 and (from_zero or low < high / 2) else low - margin), high + margin
