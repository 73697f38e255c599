"""The classics, trained on the built-in world: scores before and after, and their bars.

python examples/classics.py [autoencoder] [super-resolution] [clip] [prior] [image-decoder] [--overwrite]

Without a name, all. Prints scores before and after, and ends with 1 if one is below its bar. Several train two at a
time, each in a process of one thread; the three of unCLIP, which read each other's runs, one after the other in one.
"""

import sys
import time
from pathlib import Path

from diffusers import AutoencoderKL
from two_at_a_time import TABLE, run_parts, train

from sdtune.evaluation.toy_autoencoder import keeps_pictures
from sdtune.evaluation.toy_clip import knows_pictures
from sdtune.evaluation.toy_decoder import draws_captions
from sdtune.evaluation.toy_enlarging import enlarges_pictures
from sdtune.evaluation.toy_prior import finds_embeddings
from sdtune.models.families import resolve_model

CLIP_RUN, PRIOR_RUN = "runs/tiny-clip", "runs/tiny-prior"
GAINS = {"PSNR of stars": 0.3, "stars read": 0.08}
"""By how much a score of the autoencoder has to rise: decibels, and a share."""
LEAST = {"known shapes read": 0.95}
OVER_BICUBIC = {"PSNR of clean pictures": 0.0, "PSNR of flawed pictures": 1.5}
"""By how many decibels super-resolution has to be better than bicubic enlargement."""
CLIP_LEAST = {"caption of a picture": 0.8, "picture of a caption": 0.8, "colour": 0.95, "ground": 0.95}
DECODER_LEAST = {"colour": 0.9, "ground": 0.9}
PRIOR_LEAST = {"cosine to its picture": 0.93, "picture of a caption": 0.7}
CHANCE = {
    "caption of a picture": 1 / 64,
    "picture of a caption": 1 / 64,
    "colour": 1 / 8,
    "ground": 1 / 6,
    "shape": 1 / 7,
}


Table = tuple[str, list[str]]
"""Scores of a method as printed, and the names of those below their bars."""


def autoencoder(words: list[str]) -> Table:
    """Its decoder learns stars and hearts."""
    out = "runs/tiny-shapes"
    before = keeps_pictures(AutoencoderKL.from_pretrained(resolve_model("tiny"), subfolder="vae"))
    train("autoencoder/tiny-shapes", out, words)
    after = keeps_pictures(AutoencoderKL.from_pretrained(out))
    gained = {name: before[name] + gain for name, gain in GAINS.items()}
    return table("autoencoder", before, after, LEAST | gained)


def super_resolution(words: list[str]) -> Table:
    """From nothing, 8 pixels a side to 32, beside bicubic enlargement."""
    out = "runs/super-resolution"
    train("super-resolution/tiny-shapes", out, words)
    bicubic, ours = enlarges_pictures(Path(out))
    return table("super-resolution", bicubic, ours, {name: bicubic[name] + gain for name, gain in OVER_BICUBIC.items()})


def clip(words: list[str]) -> Table:
    """From nothing, on 20,000 drawn pictures."""
    train("clip/tiny-shapes", CLIP_RUN, words)
    return table("clip", CHANCE, knows_pictures(CLIP_RUN), CLIP_LEAST)


def prior(words: list[str]) -> Table:
    """On the CLIP of the row before; beside the mean of all embeddings, which no caption changes."""
    if not Path(CLIP_RUN, "model.safetensors").is_file():
        train("clip/tiny-shapes", CLIP_RUN, words)
    train("prior/tiny-shapes", PRIOR_RUN, words)
    mean, after = finds_embeddings(PRIOR_RUN)
    return table("prior", mean, after, PRIOR_LEAST)


def image_decoder(words: list[str]) -> Table:
    """From `tiny`, on the CLIP of its row; what it draws for captions through the prior of its row."""
    out = "runs/tiny-decoder"
    if not Path(PRIOR_RUN, "model_index.json").is_file():
        prior(words)
    train("image-decoder/tiny-shapes", out, words)
    return table("image-decoder", CHANCE, draws_captions(out, PRIOR_RUN), DECODER_LEAST)


def table(method: str, before: dict[str, float], after: dict[str, float], bars: dict[str, float]) -> Table:
    """Scores beside those before, or chance, and bars."""
    lines = [f"{method:<22}     before       after         bar"]
    for name, value in after.items():
        bar = shown(name, bars[name]) if name in bars else ""
        lines.append(f"{name:<22} {shown(name, before[name])} {shown(name, value)} {bar}")
    return "\n".join(lines), [name for name, bar in bars.items() if after[name] < bar]


def shown(name: str, value: float) -> str:
    if name.startswith("cosine"):
        return f"{value:9.3f}  "
    return f"{value:8.2f} dB" if name.startswith("PSNR") else f"{value:9.1%}  "


ROWS = {
    "autoencoder": autoencoder,
    "super-resolution": super_resolution,
    "clip": clip,
    "prior": prior,
    "image-decoder": image_decoder,
}

PARTS = ["clip prior image-decoder", "autoencoder", "super-resolution"]
"""What one process does; the longest first."""

if __name__ == "__main__":
    began = time.monotonic()
    asked = [word for word in sys.argv[1:] if word in ROWS]
    more = [word for word in sys.argv[1:] if word not in ROWS]
    if not asked:
        sys.exit(run_parts(__file__, PARTS, more))
    tables = [ROWS[row](more) for row in asked]
    print(TABLE + "\n\n".join(text for text, _ in tables))
    print(f"{time.monotonic() - began:.0f} seconds")
    if below := [name for _, names in tables for name in names]:
        sys.exit(f"below the bar: {', '.join(below)}")
