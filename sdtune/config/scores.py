"""What a score is: the figures of `sdtune evaluate` and of a run that is evaluated while it trains."""

from typing import Literal, NamedTuple, get_args

INFINITE = float("inf")


class Score(NamedTuple):
    better: Literal["higher", "lower", "neither"]
    """Neither: a figure to look at, which is best somewhere in the middle."""
    least: float
    greatest: float
    title: str
    of_network: bool = False
    """Whether its name ends with that of the network in whose features it is measured, since only such compare."""


SCORES = {
    "frechet": Score("lower", 0, INFINITE, "Fréchet distance", of_network=True),
    "kernel": Score("lower", -INFINITE, INFINITE, "Kernel distance", of_network=True),
    "precision": Score("higher", 0, 1, "Precision"),
    "recall": Score("higher", 0, 1, "Recall"),
    "likeness": Score("higher", -1, 1, "Likeness", of_network=True),
    "diversity": Score("neither", 0, INFINITE, "Diversity", of_network=True),
    "memorisation": Score("lower", 0, 1, "Memorisation", of_network=True),
    "clip_score": Score("higher", 0, 2.5, "CLIP score"),
    "edge_overlap": Score("higher", 0, 1, "Overlap of edges"),
    "edit_direction": Score("higher", -1, 1, "Direction of edits"),
    "class_accuracy": Score("higher", 0, 1, "Class accuracy"),
    "bound_fixed_small": Score("lower", 0, INFINITE, "Bits a dimension, variance fixed small"),
    "bound_fixed_large": Score("lower", 0, INFINITE, "Bits a dimension, variance fixed large"),
    "bound_learned": Score("lower", 0, INFINITE, "Bits a dimension, variance learned"),
    "holdout_loss": Score("lower", 0, INFINITE, "Holdout loss"),
}
"""By name; what each measures is in docs/evaluate.md."""

OF_INCEPTION = {"frechet": "fid", "kernel": "kid"}
"""Names of two of them if they are measured in the features of FID's Inception network, and only then."""

Criterion = Literal[
    "holdout_loss",
    "frechet",
    "kernel",
    "precision",
    "recall",
    "likeness",
    "clip_score",
    "class_accuracy",
    "edge_overlap",
    "edit_direction",
]
"""Scores by which one step is better than another. Memorisation is not: a model that learnt nothing has none."""

Agreement = Literal["edges", "edit"]
"""What images can have in common with those that they followed, or edited."""

OF_AGREEMENT: dict[Agreement, Criterion] = {"edges": "edge_overlap", "edit": "edit_direction"}
"""The score of each."""


def score_name(score: str, network: str) -> str:
    """The name of a score as it is written down, of features by a network."""
    if not SCORES[score].of_network:
        return score
    if network == "inception" and score in OF_INCEPTION:
        return OF_INCEPTION[score]
    return f"{score}_{network.replace('-', '_')}"


def score_of(name: str) -> str | None:
    """The score that a name written by `score_name` is of; None for any other figure."""
    for score, how in SCORES.items():
        if name == score and not how.of_network:
            return score
        if how.of_network and (name.startswith(f"{score}_") or name == OF_INCEPTION.get(score)):
            return score
    return None


def title(name: str) -> str:
    """A figure as a heading; a score by its title, with the network in brackets."""
    score = score_of(name)
    if score is None:
        return name[0].upper() + name[1:].replace("_", " ")
    network = name.removeprefix(f"{score}_") if name.startswith(f"{score}_") else ""
    return SCORES[score].title + (f" ({network.replace('_', ' ')})" if network else "")


def which_is_better(name: str) -> str:
    """Such as "higher is better"; empty for a figure of which that is not known."""
    score = score_of(name)
    better = SCORES[score].better if score else "neither"
    return "" if better == "neither" else f"{better} is better"


assert set(get_args(Criterion)) <= SCORES.keys()
