"""Teaches the base `tiny` a shape that it has never seen, and measures what it can draw before and after.

python examples/demo.py [--overwrite]
"""

import sys
import time

from sdtune.cli import main
from sdtune.config.verbs import SampleConfig
from sdtune.evaluation.toy_score import score
from sdtune.models.loading import load_adapters, load_pipeline

RUN = "runs/tiny-hearts"
IMAGES = 100


def measure(adapters: list[str]) -> tuple[float, float]:
    """Share of images that show a heart when one is asked for, and share of right shapes among those the base knows."""
    pipeline = load_pipeline(SampleConfig(model="tiny", prompt=["unused"]))
    load_adapters(pipeline, adapters)
    concept, known = (score(pipeline, IMAGES, shape)[0]["shape"] for shape in ("heart", None))
    return concept, known


if __name__ == "__main__":
    began = time.monotonic()
    before = measure([])
    try:
        main(["lora", "--config", "lora/tiny-hearts", "--output-dir", RUN, *sys.argv[1:]])
    except SystemExit as ended:
        if ended.code:
            raise
    after = measure([RUN])
    print(f"\n{IMAGES} images each        before   after")
    print(f"asked for hearts         {before[0]:6.0%}  {after[0]:6.0%}   show a heart")
    print(f"asked for known shapes   {before[1]:6.0%}  {after[1]:6.0%}   show the shape asked for")
    print(f"{time.monotonic() - began:.0f} seconds. Samples and curves: {RUN}/report.html")
