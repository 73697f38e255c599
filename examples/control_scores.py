"""Scores of what `control.py` trains, and of the base before: a function a method, from the folder of its run."""

from functools import cache
from typing import Any

import diffusers

from sdtune.config.verbs import SampleConfig
from sdtune.data.toy_subjects import SUBJECTS
from sdtune.data.toy_world import NEW_SHAPES
from sdtune.evaluation.toy_control import follows_edges, follows_edits
from sdtune.evaluation.toy_score import score
from sdtune.models.loading import load_adapters, load_embeddings, load_pipeline
from sdtune.models.networks import reshaped

STEPS = 6
"""Of sampling: `tiny` and what is made of it draw as well in six as in 25."""


def pipeline(**options: Any) -> Any:
    return load_pipeline(SampleConfig(prompt=["unused"], **options))


@cache  # two methods are compared with the base
def edges(run: str | None) -> dict[str, float]:
    pipe = pipeline(model="tiny", control=[run] if run else [])
    return follows_edges(pipe, steps=STEPS) | {"new": follows_edges(pipe, shapes=NEW_SHAPES, steps=STEPS)["overlap"]}


def edits(run: str | None) -> dict[str, float]:
    """Of a run, or of the base with channels for the image to edit, which it does not see yet."""
    if run:
        return follows_edits(pipeline(model=run), steps=STEPS)
    parts = pipeline(model="tiny").components
    parts["unet"] = reshaped(parts["unet"], in_channels=2 * parts["unet"].config["in_channels"])
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    return follows_edits(pipe, steps=STEPS)


def subjects(run: str | None, n: int = 30) -> dict[str, float]:
    """Of a run with two new words, or of the base, to which their subjects are the rare words of DreamBooth."""
    pipe = pipeline(model="tiny")
    if run:
        load_adapters(pipe, [run])
        load_embeddings(pipe, [], [run])
    names = {subject.shape: subject.word if run else subject.rare for subject in SUBJECTS}
    found = {shape: score(pipe, n, shape, name=name, steps=STEPS)[0]["shape"] for shape, name in names.items()}
    return found | {"others": score(pipe, n, steps=STEPS)[0]["all"]}


SCORES = {
    "controlnet": edges,
    "t2i-adapter": edges,
    "instruct-pix2pix": edits,
    "custom-diffusion": subjects,
}
