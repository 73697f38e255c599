"""How far apart two sets of features are, each [n, D], and how sure that is.

Everything is computed in 64 bits with torch.linalg, on the device of the features. No package
is used: torch-fidelity and clean-fid import torchvision; torchmetrics keeps its statistics in objects that take images,
and has no precision and recall. scipy's matrix square root is not needed: its trace is a sum of singular values, which
is exact even if a covariance has no full rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdtune.run.rng import generator

BLOCK = 2048
"""Rows compared at once: bounds memory."""


def frechet(x: Tensor, y: Tensor, n_x: Tensor | None = None, n_y: Tensor | None = None) -> float:
    """Fréchet distance of the Gaussians with the moments of x and y (Heusel et al. 2017, equation 6), squared:

        |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))

    With S = A'A, where A is the centred features over sqrt(n - 1), S_x S_y has the eigenvalues of
    (A_x A_y')'(A_x A_y'), so the trace of its root is the sum of the singular values of A_x A_y'. For that the
    triangular factor of A does as well as A. Needs two rows of each.

    Args:
        n_x, n_y: how often each row counts ``[n]``, ``[m]``, here and below; ``None`` is once.
    """
    (mu_x, A_x), (mu_y, A_y) = _moments(x, n_x), _moments(y, n_y)
    root = torch.linalg.svdvals(_triangular(A_x) @ _triangular(A_y).T).sum()
    return float((mu_x - mu_y).square().sum() + A_x.square().sum() + A_y.square().sum() - 2 * root)


def kernel_distance(x: Tensor, y: Tensor, n_x: Tensor | None = None, n_y: Tensor | None = None) -> float:
    """Squared maximum mean discrepancy under the kernel (a.b / D + 1)^3, without bias, so it may be below zero.

    Bińkowski et al. 2018, section 4: with Inception features this is KID. They average it over random subsets of
    1000 images; this is its mean over all subsets, which is the estimate from all pairs. An image that counts twice is
    two images.
    """
    x, y, n_x, n_y = x.double(), y.double(), _counts(x, n_x), _counts(y, n_y)
    between = _kernel_sum(x, y, n_x, n_y) / (n_x.sum() * n_y.sum())
    return float(_within(x, n_x) + _within(y, n_y) - 2 * between)


def precision_recall(
    x: Tensor, y: Tensor, neighbours: int = 3, n_x: Tensor | None = None, n_y: Tensor | None = None
) -> tuple[float, float]:
    """Shares of samples x among the reference y, and of y among x (Kynkäänniemi et al. 2019, equations 1 and 2).

    A point lies among a set when it is no further from some point of the set than that one's k-th nearest neighbour
    in the set. Needs more rows than ``neighbours``. How often a row counts changes the shares, not the sets: an image
    is not its own neighbour.
    """
    x, y, n_x, n_y = x.double(), y.double(), _counts(x, n_x), _counts(y, n_y)
    centre = y.mean(0)  # distances by matrix products lose digits far from zero
    x, y = x - centre, y - centre
    return _share_among(x, y, neighbours, n_x), _share_among(y, x, neighbours, n_y)


def likeness(x: Tensor, y: Tensor, n_x: Tensor | None = None, n_y: Tensor | None = None) -> float:
    """Mean cosine of all pairs of a sample x and a reference y: CLIP-I or DINO, by the network (Ruiz et al. 2022)."""
    n_x, n_y = _counts(x, n_x), _counts(y, n_y)
    directions = [functional.normalize(features.double(), dim=1) for features in (x, y)]
    return float((n_x @ directions[0] / n_x.sum()) @ (n_y @ directions[1] / n_y.sum()))


def diversity(x: Tensor, y: Tensor, n_x: Tensor | None = None, n_y: Tensor | None = None) -> float:
    """Mean distance of two samples x over that of two references y: 1 is as diverse, 0 is one image again and again.

    NaN where the references do not differ, as in a resample of few.
    """
    usual = _mean_distance(y.double(), _counts(y, n_y))
    return _mean_distance(x.double(), _counts(x, n_x)) / usual if usual else math.nan


def nearest_distances(x: Tensor, trained_on: Tensor, without_itself: bool = False) -> Tensor:
    """The distance of each x to the nearest of the images trained on ``[n]``; ``without_itself`` where x is these."""
    k = 2 if without_itself else 1
    return torch.cat([torch.cdist(b, trained_on.double()).kthvalue(k).values for b in x.double().split(BLOCK)])


def memorisation(x: Tensor, unseen: Tensor, n_x: Tensor | None = None, n_unseen: Tensor | None = None) -> float:
    """How often a sample lies nearer to the images trained on than an unseen image does, from `nearest_distances`.

    1/2 is no memorisation, 1 is a copy each time. The statistic U / nm of the test for data-copying (Meehan et al.
    2020, section 3.1), with all of the space as one cell.
    """
    n_x, n_unseen = _counts(x, n_x), _counts(unseen, n_unseen)
    nearer = (x[:, None] < unseen).double() + 0.5 * (x[:, None] == unseen)
    return float(n_x @ nearer @ n_unseen / (n_x.sum() * n_unseen.sum()))


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; the ends are None if no interval was asked for."""

    value: float
    low: float | None = None
    high: float | None = None


def estimates(
    figures: Callable[..., dict[str, float]],
    sets: Sequence[Tensor],
    resamples: int,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Estimate]:
    """``figures(*sets)``, each with an interval from ``resamples`` resamples of the sets; 0 gives none.

    The bootstrap (Efron 1979): each set is drawn anew from itself, as many rows with replacement, and the interval is
    1.96 standard deviations of the figure among the resamples to either side of its value. Percentiles would not do:
    resamples hold fewer different images, and a Fréchet distance of fewer images is larger. The interval holds
    chance, not the bias that a Fréchet distance of few images has. Resamples for which a figure is NaN do not count.

    Args:
        figures: from tensors with n rows each, and how often each of their rows counts, to figures by name. The
            counts come after all tensors, and only for resamples, of which rows that were not drawn are left out.
        resamples: 0, or at least 2.
        tick: called after each resample.
    """
    values = figures(*sets)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for r in range(resamples):
        counts = [_drawn(len(s), generator(seed, "resample", r, k)).to(s.device) for k, s in enumerate(sets)]
        rows = [s[n > 0] for s, n in zip(sets, counts, strict=True)]
        for name, value in figures(*rows, *(n[n > 0] for n in counts)).items():
            drawn[name].append(value)
        tick()
    if not resamples:
        return {name: Estimate(value) for name, value in values.items()}
    found = {}
    for name, value in values.items():
        resampled = torch.tensor(drawn[name], dtype=torch.float64)
        resampled = resampled[~resampled.isnan()]
        away = 1.96 * float(resampled.std()) if len(resampled) > 1 else math.nan
        found[name] = Estimate(value, value - away, value + away)
    return found


def mean(values: Tensor, counts: Tensor | None = None) -> float:
    """Mean of ``[n]``."""
    n = _counts(values, counts)
    return float((values.double() * n).sum() / n.sum())


def _drawn(n: int, generator: torch.Generator) -> Tensor:
    """How often each of n rows comes up when n are drawn with replacement."""
    return torch.randint(n, (n,), generator=generator).bincount(minlength=n)


def _counts(x: Tensor, counts: Tensor | None) -> Tensor:
    return x.new_ones(len(x), dtype=torch.float64) if counts is None else counts.double()


def _moments(x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean [D] and centred features over sqrt(n - 1) [n, D]."""
    x, n = x.double(), _counts(x, counts)
    mu = n @ x / n.sum()
    return mu, (x - mu) * (n / (n.sum() - 1)).sqrt()[:, None]


def _triangular(A: Tensor) -> Tensor:
    """R with R'R = A'A, of no more rows than A has columns."""
    return torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A


def _kernel(products: Tensor, x: Tensor) -> Tensor:
    return (products / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor, n_x: Tensor, n_y: Tensor) -> Tensor:
    blocks = zip(x.split(BLOCK), n_x.split(BLOCK), strict=True)
    return torch.stack([n @ _kernel(block @ y.T, x) @ n_y for block, n in blocks]).sum()


def _within(x: Tensor, n: Tensor) -> Tensor:
    """Mean of the kernel over all pairs of two images."""
    with_itself = n @ _kernel(x.square().sum(1), x)
    return (_kernel_sum(x, x, n, n) - with_itself) / (n.sum() * (n.sum() - 1))


def _mean_distance(x: Tensor, n: Tensor) -> float:
    """Mean distance of two of x; a row that counts twice is two images."""
    total = sum(float(n_b @ torch.cdist(b, x) @ n) for b, n_b in zip(x.split(BLOCK), n.split(BLOCK), strict=True))
    return total / float(n.sum() * (n.sum() - 1))


def _share_among(queries: Tensor, points: Tensor, k: int, counts: Tensor) -> float:
    nearest = min(k + 1, len(points))  # one is itself; a resample of a handful may have fewer
    radii = torch.cat([torch.cdist(b, points).kthvalue(nearest).values for b in points.split(BLOCK)])
    inside = torch.cat([(torch.cdist(b, points) <= radii).any(1) for b in queries.split(BLOCK)])
    return mean(inside, counts)
