"""Networks that follow an image, a model that edits one, and subjects with new words, trained on `tiny` and scored.

python examples/control.py [controlnet] [t2i-adapter] [instruct-pix2pix] [custom-diffusion] [--overwrite]

Prints scores before and after, and ends with 1 if one is below its bar. Several methods train two at a time, each in a
process of one thread.
"""

import sys
import time
from typing import Any

import diffusers
from two_at_a_time import TABLE, run_parts, train

from sdtune.config.verbs import SampleConfig
from sdtune.data.toy_subjects import SUBJECTS
from sdtune.data.toy_world import NEW_SHAPES
from sdtune.evaluation.toy_control import follows_edges, follows_edits
from sdtune.evaluation.toy_score import score
from sdtune.models.loading import load_adapters, load_embeddings, load_pipeline
from sdtune.models.networks import reshaped

RUNS = {
    "instruct-pix2pix": ("instruct-pix2pix/tiny-edits", "runs/tiny-edits"),
    "custom-diffusion": ("custom-diffusion/tiny-words", "runs/tiny-words-custom"),
    "controlnet": ("controlnet/tiny-edges", "runs/tiny-edges"),
    "t2i-adapter": ("t2i-adapter/tiny-edges", "runs/tiny-edges-adapter"),
}
"""Method to its recipe and the folder of its run; the longest first."""
BARS: dict[str, dict[str, float]] = {
    "controlnet": {"overlap": 0.75, "close": 0.85, "shape": 0.50, "colour": 0.95, "ground": 0.95, "new": 0.60},
    "t2i-adapter": {"overlap": 0.75, "close": 0.85, "shape": 0.45},
    "instruct-pix2pix": {"right": 0.65, "kept": 0.45, "both": 0.33},
    "custom-diffusion": {"arrow": 0.8, "moon": 0.8, "others": 0.7},
}
MEANING = {
    "overlap": "overlap of the shape with the one whose edges were given",
    "close": "images in which it is above 0.7",
    "shape": "shape as in the caption",
    "colour": "colour as in the caption",
    "ground": "background as in the caption",
    "new": "overlap for stars and hearts, which the base has never seen",
    "right": "edits that did what was asked",
    "kept": "edits that left the rest as it was",
    "both": "edits that did both",
    "arrow": "images of the first new word that show its subject",
    "moon": "images of the second one that show its subject",
    "others": "images of shapes that the base knew which are right",
}


def pipeline(**options: Any) -> Any:
    return load_pipeline(SampleConfig(prompt=["unused"], **options))


def edges(run: str | None) -> dict[str, float]:
    pipe = pipeline(model="tiny", control=[run] if run else [])
    return follows_edges(pipe) | {"new": follows_edges(pipe, shapes=NEW_SHAPES)["overlap"]}


def edits(run: str | None) -> dict[str, float]:
    """Of a run, or of the base with channels for the image to edit, which it does not see yet."""
    if run:
        return follows_edits(pipeline(model=run))
    parts = pipeline(model="tiny").components
    parts["unet"] = reshaped(parts["unet"], in_channels=2 * parts["unet"].config["in_channels"])
    return follows_edits(diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))


def subjects(run: str | None, n: int = 30) -> dict[str, float]:
    """Of a run with two new words, or of the base, to which their subjects are the rare words of DreamBooth."""
    pipe = pipeline(model="tiny")
    if run:
        load_adapters(pipe, [run])
        load_embeddings(pipe, [], [run])
    names = {subject.shape: subject.word if run else subject.rare for subject in SUBJECTS}
    found = {shape: score(pipe, n, shape, name=name)[0]["shape"] for shape, name in names.items()}
    return found | {"others": score(pipe, n)[0]["all"]}


SCORES = {
    "controlnet": edges,
    "t2i-adapter": edges,
    "instruct-pix2pix": edits,
    "custom-diffusion": subjects,
}


def run(method: str, words: list[str]) -> list[str]:
    """Train a method, and print its scores; those below their bars."""
    recipe, out = RUNS[method]
    before = SCORES[method](None)
    train(recipe, out, words)
    after, below = SCORES[method](out), []
    print(f"{TABLE}{method:<18} before   after     bar")
    for name, value in after.items():
        bar = BARS[method].get(name)
        shown = f"{bar:7.0%}" if bar else " " * 7
        print(f"{'':<16} {before[name]:8.0%} {value:7.0%} {shown}   {MEANING[name]}")
        if bar and value < bar:
            below.append(f"{method}: {name}")
    return below


if __name__ == "__main__":
    began = time.monotonic()
    methods = [word for word in sys.argv[1:] if word in RUNS] or list(RUNS)
    words = [word for word in sys.argv[1:] if word not in RUNS]
    if len(methods) > 1:
        sys.exit(run_parts(__file__, methods, words))
    below = run(methods[0], words)
    print(f"{time.monotonic() - began:.0f} seconds")
    if below:
        sys.exit(f"below the bar: {', '.join(below)}")
