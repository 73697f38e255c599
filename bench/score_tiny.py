"""Scores a model of the toy world on seeded held-out captions.

python bench/score_tiny.py                                # the base, on shapes it knows
python bench/score_tiny.py --lora runs/tiny-hearts --shape heart
"""

import argparse
import json
from pathlib import Path

from sdtune.config.verbs import SampleConfig
from sdtune.evaluation.toy_score import GUIDANCE, STEPS, score
from sdtune.models.loading import load_adapters, load_pipeline
from sdtune.run.contact_sheet import grid

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lora", nargs="*", default=[], help="adapters, each with an optional =WEIGHT")
    parser.add_argument("--shape", help="ask for this shape alone")
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE)
    parser.add_argument("--sheet", type=Path, help="write the first images as a sheet to this PNG")
    given = parser.parse_args()
    pipeline = load_pipeline(SampleConfig(model=given.model, prompt=["unused"]))
    load_adapters(pipeline, given.lora)
    shares, images, captions = score(pipeline, given.n, given.shape, given.seed, given.steps, given.guidance_scale)
    print(json.dumps({"n": given.n, "guidance_scale": given.guidance_scale, "steps": given.steps} | shares))
    if given.sheet:
        grid(images[:32], captions[:32], columns=8).save(given.sheet)
