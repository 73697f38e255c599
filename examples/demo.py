"""Teaches a built-in base a shape that it has never seen, and measures what it can draw before and after.

python examples/demo.py [--overwrite]                # `tiny`
python examples/demo.py tiny-flow [--overwrite]      # `tiny-flow`, which was made by flow matching
"""

import sys
import time

from sdtune.cli import main
from sdtune.config.verbs import SampleConfig
from sdtune.evaluation.toy_score import score
from sdtune.models.loading import load_adapters, load_pipeline

IMAGES = 100
STEPS = {"tiny": 25, "tiny-flow": 10}
"""Steps of a sample; straight paths need fewer."""


def measure(base: str, adapters: list[str]) -> tuple[float, float]:
    """Share of images that show a heart when one is asked for, and share of right shapes among those the base knows."""
    pipeline = load_pipeline(SampleConfig(model=base, prompt=["unused"]))
    load_adapters(pipeline, adapters)
    concept, known = (score(pipeline, IMAGES, shape, steps=STEPS[base])[0]["shape"] for shape in ("heart", None))
    return concept, known


if __name__ == "__main__":
    began = time.monotonic()
    options = sys.argv[1:]
    base = options.pop(0) if options and not options[0].startswith("-") else "tiny"
    run = f"runs/{base}-hearts"
    before = measure(base, [])
    try:
        main(["lora", "--config", f"lora/{base}-hearts", "--output-dir", run, *options])
    except SystemExit as ended:
        if ended.code:
            raise
    after = measure(base, [run])
    print(f"\n{IMAGES} images each        before   after")
    print(f"asked for hearts         {before[0]:6.0%}  {after[0]:6.0%}   show a heart")
    print(f"asked for known shapes   {before[1]:6.0%}  {after[1]:6.0%}   show the shape asked for")
    print(f"{time.monotonic() - began:.0f} seconds. Samples and curves: {run}/report.html")
