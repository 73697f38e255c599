"""The classics, trained on the built-in world: scores before and after, and their bars. So far autoencoder and CLIP.

python examples/classics.py [autoencoder] [clip] [--overwrite]

Without a name, all. Ends with 1 if a score is below its bar.
"""

import sys
import time

from diffusers import AutoencoderKL

from sdtune.cli import main
from sdtune.evaluation.toy_autoencoder import keeps_pictures
from sdtune.evaluation.toy_clip import knows_pictures
from sdtune.models.families import resolve_model

GAINS = {"PSNR of stars": 0.3, "stars read": 0.08}
"""By how much a score of the autoencoder has to rise: decibels, and a share."""
LEAST = {"known shapes read": 0.95}
CLIP_LEAST = {"caption of a picture": 0.8, "picture of a caption": 0.8, "colour": 0.95, "ground": 0.95}
CHANCE = {
    "caption of a picture": 1 / 64,
    "picture of a caption": 1 / 64,
    "colour": 1 / 8,
    "ground": 1 / 6,
    "shape": 1 / 7,
}


def train(method: str, recipe: str, out: str, words: list[str]) -> None:
    try:
        main([method, "--config", recipe, "--output-dir", out, *words])
    except SystemExit as ended:
        if ended.code:
            raise


def autoencoder(words: list[str]) -> list[str]:
    """Its decoder learns stars and hearts; the scores below their bars."""
    out = "runs/tiny-shapes"
    before = keeps_pictures(AutoencoderKL.from_pretrained(resolve_model("tiny"), subfolder="vae"))
    train("autoencoder", "autoencoder/tiny-shapes", out, words)
    after = keeps_pictures(AutoencoderKL.from_pretrained(out))
    gained = {name: before[name] + gain for name, gain in GAINS.items()}
    return table("autoencoder", before, after, LEAST | gained)


def clip(words: list[str]) -> list[str]:
    """From nothing, on 20,000 drawn pictures; the scores below their bars."""
    out = "runs/tiny-clip"
    train("clip", "clip/tiny-shapes", out, words)
    return table("clip", CHANCE, knows_pictures(out), CLIP_LEAST)


def table(method: str, before: dict[str, float], after: dict[str, float], bars: dict[str, float]) -> list[str]:
    """Print scores beside those before, or chance, and bars; the names of those below."""
    print(f"\n{method:<22}     before       after         bar")
    for name, value in after.items():
        bar = shown(name, bars[name]) if name in bars else ""
        print(f"{name:<22} {shown(name, before[name])} {shown(name, value)} {bar}")
    return [name for name, bar in bars.items() if after[name] < bar]


def shown(name: str, value: float) -> str:
    return f"{value:8.2f} dB" if name.startswith("PSNR") else f"{value:9.1%}  "


ROWS = {"autoencoder": autoencoder, "clip": clip}

if __name__ == "__main__":
    began = time.monotonic()
    asked = [word for word in sys.argv[1:] if word in ROWS] or list(ROWS)
    more = [word for word in sys.argv[1:] if word not in ROWS]
    below = [name for row in asked for name in ROWS[row](more)]
    print(f"{time.monotonic() - began:.0f} seconds")
    if below:
        sys.exit(f"below the bar: {', '.join(below)}")
