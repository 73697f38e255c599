"""A picture of an evaluation: where samples and reference lie, and each figure with its interval. By matplotlib."""

from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from sdtune.evaluation.distances import Estimate
from sdtune.run.rng import generator

SHOWN = 2000
"""Points of a set in the scatter at most; more only cover each other."""
GREY, BLUE = "#9aa0a6", "#1f6feb"


@dataclass(frozen=True)
class Shown:
    """A figure: its name, whether less of it is better, and its value."""

    name: str
    less: bool
    estimate: Estimate


def picture(x: Tensor, y: Tensor, figures: list[Shown], title: str) -> Image.Image:
    """Samples x [n, D] and reference y [m, D] along the two directions in which the reference varies most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(sheet)
    sheet.suptitle(title, fontsize=11)
    left, right = sheet.subfigures(1, 2, width_ratios=(1, 1))
    scatter = left.subplots()
    mean = y.mean(0)
    directions = torch.linalg.svd(y - mean, full_matrices=False).Vh[:2].T
    for points, color, name in ((y, GREY, "reference"), (x, BLUE, "samples")):
        some = points[torch.randperm(len(points), generator=generator(0, "scatter"))[:SHOWN]]
        at = ((some - mean) @ directions).T
        scatter.scatter(*at, s=6, alpha=0.6, color=color, label=f"{name} ({len(points)})", linewidths=0)
    scatter.set(xlabel="first principal component of the reference", ylabel="second", xticks=[], yticks=[])
    scatter.legend(loc="upper right", fontsize=8, markerscale=2)
    for axes, shown in zip(right.subplots(len(figures), 1, squeeze=False)[:, 0], figures, strict=True):
        e = shown.estimate
        if e.low is not None and e.high is not None:
            axes.plot([e.low, e.high], [0, 0], color=BLUE, linewidth=3, solid_capstyle="butt", alpha=0.5)
        axes.plot([e.value], [0], "o", color=BLUE)
        axes.set_title(f"{shown.name}: {e.value:.4g} ({'lower' if shown.less else 'higher'} is better)", fontsize=9)
        axes.set(yticks=[])
        axes.margins(x=0.3)
        axes.tick_params(labelsize=8)
        axes.spines[["left", "right", "top"]].set_visible(False)
    file = BytesIO()
    sheet.savefig(file, format="png", metadata={"Software": None})
    return Image.open(file)
