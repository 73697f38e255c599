"""The classics, trained on the built-in model: scores before and after, and their bars. So far the autoencoder.

python examples/classics.py [--overwrite]

Ends with 1 if a score is below its bar.
"""

import sys
import time
from typing import Any

from diffusers import AutoencoderKL

from sdtune.cli import main
from sdtune.evaluation.toy_autoencoder import keeps_pictures
from sdtune.models.families import resolve_model

RECIPE, OUT = "autoencoder/tiny-shapes", "runs/tiny-shapes"
GAINS = {"PSNR of stars": 0.3, "stars read": 0.08}
"""By how much a score has to rise: decibels, and a share."""
LEAST = {"known shapes read": 0.95}


def scores(**where: Any) -> dict[str, float]:
    return keeps_pictures(AutoencoderKL.from_pretrained(**where))


def shown(name: str, value: float) -> str:
    return f"{value:8.2f} dB" if name.startswith("PSNR") else f"{value:9.0%}  "


if __name__ == "__main__":
    began = time.monotonic()
    before = scores(pretrained_model_name_or_path=resolve_model("tiny"), subfolder="vae")
    try:
        main(["autoencoder", "--config", RECIPE, "--output-dir", OUT, *sys.argv[1:]])
    except SystemExit as ended:
        if ended.code:
            raise
    after = scores(pretrained_model_name_or_path=OUT)
    print(f"\n{'':<22}     before       after         bar")
    below = []
    for name, value in after.items():
        bar = LEAST.get(name, before[name] + GAINS[name] if name in GAINS else None)
        print(f"{name:<22} {shown(name, before[name])} {shown(name, value)} {shown(name, bar) if bar else ''}")
        if bar and value < bar:
            below.append(name)
    print(f"{time.monotonic() - began:.0f} seconds")
    if below:
        sys.exit(f"below the bar: {', '.join(below)}")
