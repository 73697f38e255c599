"""The rows of `classics.py`: each trains, scores before and after, and compares with its bars."""

from pathlib import Path

from diffusers import AutoencoderKL
from two_at_a_time import train

from sdtune.config.verbs import EvaluateConfig
from sdtune.evaluation import bound
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
BITS_LEAST = {"bits saved": 0.05}
DECODER_LEAST = {"colour": 0.9, "ground": 0.9}
PRIOR_LEAST = {"cosine to its picture": 0.93, "picture of a caption": 0.7}
DIGITS = 40
"""How many of the 297 that are held out the bound is measured on: 1,000 predictions each."""
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


def learned_variance(words: list[str]) -> Table:
    """Of digits that were not trained on, beside the fixed large variance on the same predictions."""
    out = "runs/ddpm-digits-learned-variance"
    train("ddpm/digits-learned-variance", out, words)
    asked = EvaluateConfig(samples=out, reference="digits", bound=True, levels=17, num_holdout_images=DIGITS)
    found, _ = bound.measure(asked)
    fixed, learned = (found[f"bound_{name}"].value for name in ("fixed_large", "learned"))
    before, after = ({"bits a dimension": bits, "bits saved": fixed - bits} for bits in (fixed, learned))
    return table("learned-variance", before, after, BITS_LEAST)


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
    if name.startswith(("cosine", "bits")):
        return f"{value:9.3f}  "
    return f"{value:8.2f} dB" if name.startswith("PSNR") else f"{value:9.1%}  "


ROWS = {
    "autoencoder": autoencoder,
    "super-resolution": super_resolution,
    "learned-variance": learned_variance,
    "clip": clip,
    "prior": prior,
    "image-decoder": image_decoder,
}
