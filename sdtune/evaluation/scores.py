"""Scores of a set of images, with 95 % intervals: of `sdtune evaluate`, and of a run while it trains."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sdtune.config.scores import SCORES
from sdtune.evaluation.distances import (
    Estimate,
    diversity,
    estimates,
    frechet,
    kernel_distance,
    likeness,
    mean,
    memorisation,
    nearest_distances,
    precision_recall,
)
from sdtune.models.vision import device


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made; see `distances.estimates`."""

    resamples: int
    seed: int = 0
    tick: Callable[[], object] = lambda: None

    def __call__(self, measure: Callable[..., dict[str, float]], *sets: Tensor) -> dict[str, Estimate]:
        """``measure(*sets)`` without what is NaN, each with an interval that is clipped to the range of the score.

        An interval that cannot be told, since too few resamples have the figure, is left out.
        """
        found = estimates(measure, [s.double().to(device()) for s in sets], self.resamples, self.seed, self.tick)
        known = {name: e for name, e in found.items() if not math.isnan(e.value)}
        return {name: clipped(e, SCORES[name].least, SCORES[name].greatest) for name, e in known.items()}


def clipped(e: Estimate, least: float, greatest: float) -> Estimate:
    """The estimate with its interval clipped to the range of the score."""
    if e.low is None or e.high is None:
        return e
    if math.isnan(e.low):
        return Estimate(e.value)
    return Estimate(e.value, max(e.low, least), min(e.high, greatest))


def figures(
    x: Tensor, y: Tensor, n_x: Tensor | None = None, n_y: Tensor | None = None, neighbours: int = 3
) -> dict[str, float]:
    """The distances of samples x [n, D] and a reference y [m, D], as features; for n_x and n_y see `distances`."""
    precision, recall = precision_recall(x, y, neighbours, n_x, n_y)
    return {
        "frechet": frechet(x, y, n_x, n_y),
        "kernel": kernel_distance(x, y, n_x, n_y),
        "precision": precision,
        "recall": recall,
    }


def of_subject(x: Tensor, y: Tensor, n_x: Tensor | None = None, n_y: Tensor | None = None) -> dict[str, float]:
    """How alike samples x are to images y of what was learnt, and how diverse beside them."""
    return {"likeness": likeness(x, y, n_x, n_y), "diversity": diversity(x, y, n_x, n_y)}


def of_copies(x: Tensor, trained_on: Tensor, unseen: Tensor | None, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Whether samples x copy the images trained on, by features.

    Args:
        unseen: images like those trained on; None compares with how far apart those trained on are.
    """
    if unseen is None:
        usual = nearest_distances(trained_on, trained_on, without_itself=True)
    else:
        usual = nearest_distances(unseen, trained_on)
    return bootstrap(lambda *s: {"memorisation": memorisation(*s)}, nearest_distances(x, trained_on), usual)


def mean_of(score: str, values: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """A score that is the mean of one value for each image [n]."""
    return bootstrap(lambda *s: {score: mean(*s)}, values)


def flat(found: dict[str, Estimate], names: Callable[[str], str]) -> dict[str, float]:
    """Estimates as numbers by name, with the ends of their intervals as ``NAME_low`` and ``NAME_high``."""
    numbers: dict[str, float] = {}
    for score, e in found.items():
        numbers[names(score)] = e.value
        if e.low is not None and e.high is not None:
            numbers |= {f"{names(score)}_low": e.low, f"{names(score)}_high": e.high}
    return numbers


def least_images(neighbours: int, resamples: int) -> int:
    """Images that a set needs to have neighbours; resamples need twice as many."""
    least = max(2, neighbours + 1)
    return 2 * least if resamples else least
