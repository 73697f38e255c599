"""Networks that follow an image and a model that edits one, trained on `tiny`: scores before and after, and their bars.

python examples/control.py [controlnet] [t2i-adapter] [instruct-pix2pix] [--overwrite]

Ends with 1 if a score is below its bar.
"""

import sys
import time
from typing import Any

from sdtune.cli import main
from sdtune.config.verbs import SampleConfig
from sdtune.data.toy_world import NEW_SHAPES
from sdtune.evaluation.toy_control import follows_edges, follows_edits
from sdtune.models.loading import load_pipeline

RUNS = {
    "controlnet": ("controlnet/tiny-edges", "runs/tiny-edges"),
    "t2i-adapter": ("t2i-adapter/tiny-edges", "runs/tiny-edges-adapter"),
    "instruct-pix2pix": ("instruct-pix2pix/tiny-edits", "runs/tiny-edits"),
}
"""Method to its recipe and the folder of its run."""
BARS: dict[str, dict[str, float]] = {
    "controlnet": {"overlap": 0.75, "close": 0.85, "shape": 0.50, "colour": 0.95, "ground": 0.95, "new": 0.60},
    "t2i-adapter": {"overlap": 0.75, "close": 0.85, "shape": 0.45},
    "instruct-pix2pix": {"right": 0.65, "kept": 0.45, "both": 0.33},
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
}


def pipeline(**options: Any) -> Any:
    return load_pipeline(SampleConfig(prompt=["unused"], **options))


def scores(method: str, run: str | None) -> dict[str, float]:
    """Of a run, or of the base without it."""
    if method == "instruct-pix2pix":
        return follows_edits(pipeline(model=run)) if run else {}
    pipe = pipeline(model="tiny", control=[run] if run else [])
    return follows_edges(pipe) | {"new": follows_edges(pipe, shapes=NEW_SHAPES)["overlap"]}


def train(recipe: str, out: str, words: list[str]) -> None:
    try:
        main([recipe.partition("/")[0], "--config", recipe, "--output-dir", out, *words])
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    began, below = time.monotonic(), []
    methods = [word for word in sys.argv[1:] if word in RUNS] or list(RUNS)
    words = [word for word in sys.argv[1:] if word not in RUNS]
    for method in methods:
        recipe, out = RUNS[method]
        before = scores(method, None)
        train(recipe, out, words)
        after = scores(method, out)
        print(f"\n{method:<18} before   after     bar")
        for name, value in after.items():
            bar = BARS[method].get(name)
            shown = f"{before[name]:8.0%}" if name in before else " " * 8
            print(f"{'':<16} {shown} {value:7.0%} {f'{bar:7.0%}' if bar else ' ' * 7}   {MEANING[name]}")
            if bar and value < bar:
                below.append(f"{method}: {name}")
    print(f"{time.monotonic() - began:.0f} seconds")
    if below:
        sys.exit(f"below the bar: {', '.join(below)}")
