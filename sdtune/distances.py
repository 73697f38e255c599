"""How far apart two sets of features are, each [n, D], and how sure that is.

Everything is computed in 64 bits with torch.linalg, on the device of the features. Packages were looked at first:
torch-fidelity and clean-fid import torchvision; torchmetrics hides its statistics in objects that want images, and has
no precision and recall. scipy's matrix square root is not needed: the trace of it is a sum of singular values, which
also stays exact where a covariance has no full rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdtune.draws import rng

BLOCK = 2048
"""Rows compared at once: bounds memory."""


def frechet(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of the Gaussians with the moments of x and y (Heusel et al. 2017, equation 6), squared:

        |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))

    With S = A'A, where A is the centred features over sqrt(n - 1), S_x S_y has the eigenvalues of
    (A_x A_y')'(A_x A_y'), so the trace of its root is the sum of the singular values of A_x A_y'. For that the
    triangular factor of A does as well as A. Needs two rows of each.
    """
    (mu_x, A_x), (mu_y, A_y) = _moments(x), _moments(y)
    root = torch.linalg.svdvals(_triangular(A_x) @ _triangular(A_y).T).sum()
    return float((mu_x - mu_y).square().sum() + A_x.square().sum() + A_y.square().sum() - 2 * root)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy under the kernel (a.b / D + 1)^3, without bias, so it may be below zero.

    Bińkowski et al. 2018, section 4: with Inception features this is KID. They average it over random subsets of
    1000 images; this is its mean over all subsets, which is the estimate from all pairs.
    """
    n, m = len(x), len(y)
    x, y = x.double(), y.double()
    within = (_kernel_sum(x, x) - _kernel(x.square().sum(1), x).sum()) / (n * (n - 1))
    between = (_kernel_sum(y, y) - _kernel(y.square().sum(1), y).sum()) / (m * (m - 1))
    return float(within + between - 2 * _kernel_sum(x, y) / (n * m))


def precision_recall(x: Tensor, y: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of samples x among the reference y, and of y among x (Kynkäänniemi et al. 2019, equations 1 and 2).

    A point lies among a set when it is no further from some point of the set than that one's k-th nearest neighbour
    in the set. Needs more rows than ``neighbours``.
    """
    x, y = x.double(), y.double()
    centre = y.mean(0)  # distances by matrix products lose digits far from zero
    x, y = x - centre, y - centre
    return _share_among(x, y, neighbours), _share_among(y, x, neighbours)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; the ends are none when no interval was asked for."""

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
    """``figures(*sets)``, each with an interval from ``resamples`` random halves of the sets; 0 gives none.

    The spread of a figure among halves drawn without replacement is that of the figure of the whole among new sets
    of its size (Shao & Wu 1989, the jackknife that deletes half). The usual bootstrap draws with replacement, and an
    image drawn twice is its own nearest neighbour and its own pair, which moves all of these figures. The interval is
    1.96 standard deviations to either side: it holds chance, not the bias that a Fréchet distance of few images has.

    Args:
        figures: from tensors with n rows each to figures by name.
        resamples: 0, or at least 2.
        tick: called after each half.
    """
    whole = figures(*sets)
    drawn: dict[str, list[float]] = {name: [] for name in whole}
    for r in range(resamples):
        halves = [
            s[torch.randperm(len(s), generator=rng(seed, "half", r, k))[: len(s) // 2].to(s.device)]
            for k, s in enumerate(sets)
        ]
        for name, value in figures(*halves).items():
            drawn[name].append(value)
        tick()
    if not resamples:
        return {name: Estimate(value) for name, value in whole.items()}
    found = {}
    for name, value in whole.items():
        away = 1.96 * float(torch.tensor(drawn[name], dtype=torch.float64).std())
        found[name] = Estimate(value, value - away, value + away)
    return found


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and centred features over sqrt(n - 1) [n, D]."""
    x = x.double()
    mu = x.mean(0)
    return mu, (x - mu) / (len(x) - 1) ** 0.5


def _triangular(A: Tensor) -> Tensor:
    """R with R'R = A'A, of no more rows than A has columns."""
    return torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A


def _kernel(products: Tensor, x: Tensor) -> Tensor:
    return (products / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([_kernel(block @ y.T, x).sum() for block in x.split(BLOCK)]).sum()


def _share_among(queries: Tensor, points: Tensor, k: int) -> float:
    radii = torch.cat([torch.cdist(b, points).kthvalue(k + 1).values for b in points.split(BLOCK)])  # one is itself
    inside = [(torch.cdist(b, points) <= radii).any(1) for b in queries.split(BLOCK)]
    return float(torch.cat(inside).double().mean())
