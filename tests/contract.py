"""What every recipe is held to in ``test_resume`` and ``test_cuts``: a new one adds a row here, and nothing there.

A row costs the suite at most 20 s of a core: its runs are small and draw no images that nobody looks at, what several
tests compare with is made once a session (``conftest.shared``), processes are forked, and a variant is one killed run
of six steps. Put all options that go together into one variant, after ``TOGETHER``: a state that is not saved shows
there as well. A second variant is for what cannot go with it.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor


class Places(NamedTuple):
    """Where the tests have a small pipeline, captioned pictures, and small models of pixels, CLIP, and unCLIP."""

    sd: Path
    pictures: Path
    pixels: Path
    clip: Path = Path()
    prior: Path = Path()
    decoder: Path = Path()


@dataclass(frozen=True)
class Contract:
    """A recipe in small.

    Attributes:
        settings: options of a short run on ``{sd}`` and ``{pictures}``, by flag.
        weights: the file of the artefact that holds what was trained, below the run's folder.
        variants: further options, by name, with each of which a killed run has to go on to the same bits.
        draws: options that draw whatever the recipe can draw; however a step is cut, it has to end the same.
        previews: options that make it draw samples on the way, which must change nothing.
        method: its command, where that is not the name of the row.
        chunks: whether it sees a batch in chunks, and refuses to accumulate gradients.
    """

    settings: dict[str, object]
    weights: str
    variants: dict[str, list[str]]
    draws: list[str] = field(default_factory=list)
    previews: list[str] = field(default_factory=list)
    method: str = ""
    chunks: bool = False

    def cut(self, size: int, times: int) -> list[str]:
        """Options that have a process see ``size`` pictures at a time, ``times`` in a step."""
        if self.chunks:
            return ["--train-batch-size", str(size * times), "--chunk-size", str(size)]
        return ["--train-batch-size", str(size), "--gradient-accumulation-steps", str(times)]

    def artefact(self, out: Path) -> dict[str, Tensor]:
        """Its tensors, without the empty ones that mark what did not train."""
        return {name: tensor for name, tensor in load_file(out / self.weights).items() if tensor.numel()}


NO_PREVIEWS = {"--num-validation-images": 0, "--validation-inference-steps": 1}
PREVIEWS = ["--num-validation-images", "3"]
WORKERS = ["--dataloader-num-workers", "2", "--train-batch-size", "1", "--gradient-accumulation-steps", "2"]
TOGETHER = [*WORKERS, "--use-ema", "--ema-power", "0.75"]
"""What every recipe can be killed with: loader workers, accumulation, an average of the weights.

A recipe that has a target network, which is an average, has only the first two.
"""
COMMON = {"workers, accumulation, average": TOGETHER}
SMALL = {
    "--resolution": 16,
    "--block-out-channels": "8 16",
    "--attention-resolutions": 8,
    "--layers-per-block": 1,
    "--norm-num-groups": 4,
    "--lr-scheduler": "constant",
}
"""A network of pixels."""
# The true gradient of a key's bias is zero, and Adam makes full steps of what rounding leaves of it.
STEADY = ["--learning-rate", "1e-4", "--adam-epsilon", "1e-3"]

FIRST = ["--discretization", "square_root", "--density", "uniform", "--loss-type", "l2", "--solver", "euler"]
"""Consistency models of 2023's first paper."""

RECIPES = {
    "lora": Contract(
        settings={"--model": "{sd}", "--resolution": 32, **NO_PREVIEWS},
        weights="pytorch_lora_weights.safetensors",
        variants={
            "plain": [],
            "text encoder, dropout, buckets": [
                *(*TOGETHER, "--train-text-encoder", "--dropout", "0.1", "--lr-scheduler", "cosine"),
                *("--no-center-crop", "--random-flip", "--buckets", "--bucket-step", "8"),
            ],
            "8 bits": ["--quantize-base", "int8", "--optimizer", "torchao_adamw8bit", "--rank", "128"],
        },
        draws=[
            *("--learning-rate", "1e-4", "--random-flip", "--caption-dropout", "0.2", "--noise-offset", "0.05"),
            *("--use-ema", "--snr-gamma", "5"),
        ],
        previews=PREVIEWS,
    ),
    "lora, LoHa": Contract(
        method="lora",
        settings={"--model": "{sd}", "--resolution": 32, **NO_PREVIEWS, "--adapter": "loha"},
        weights="pytorch_lora_weights.safetensors",
        variants={
            "convolutions, rows left out, text encoder": [
                *("--target-modules", "to_q", "to_v", "conv1", "--rank-dropout", "0.2"),
                *("--train-text-encoder", "--use-ema"),
            ],
        },
        draws=["--random-flip", "--target-modules", "to_q", "to_v", "conv1", *STEADY],
        previews=PREVIEWS,
    ),
    "lora, LoKr": Contract(
        method="lora",
        settings={"--model": "{sd}", "--resolution": 32, **NO_PREVIEWS, "--adapter": "lokr", "--decompose-factor": 2},
        weights="pytorch_lora_weights.safetensors",
        variants={
            "both factors, a core": [
                *("--decompose-both", "--rank", "1", "--use-effective-conv2d"),
                *("--target-modules", "to_q", "to_v", "conv1"),
            ],
            "8 bits": ["--quantize-base", "int8"],
        },
        draws=["--random-flip", "--train-text-encoder", *STEADY],
        previews=PREVIEWS,
    ),
    "lora, PiSSA": Contract(
        method="lora",
        settings={"--model": "{sd}", "--resolution": 32, **NO_PREVIEWS, "--lora-plus-ratio": 4},
        weights="pytorch_lora_weights.safetensors",
        variants={"by a draw": ["--init-lora-weights", "pissa_niter_4", "--train-text-encoder"]},
        draws=["--random-flip", "--init-lora-weights", "pissa", *STEADY],
        previews=PREVIEWS,
    ),
    "dreambooth": Contract(
        settings={
            "--model": "{sd}",
            "--resolution": 32,
            "--prior-preservation": "",
            "--class-data": "{pictures}",
            "--num-class-images": 11,
            "--learning-rate": "1e-3",
            **NO_PREVIEWS,
        },
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={
            "text encoder, flips": [
                *(*TOGETHER, "--train-text-encoder", "--random-flip", "--no-center-crop", "--snr-gamma", "5"),
            ],
        },
        draws=["--learning-rate", "1e-5", "--random-flip", "--prior-loss-weight", "0.5", "--use-ema"],
        previews=PREVIEWS,
    ),
    "dreambooth, adapters and a word": Contract(
        method="dreambooth",
        settings={
            "--model": "{sd}",
            "--resolution": 32,
            "--lora": "",
            "--placeholder-token": "<thing>",
            "--caption": "'a <thing> circle'",
            **NO_PREVIEWS,
        },
        weights="pytorch_lora_weights.safetensors",
        variants={
            "text encoder, dropout": [
                *(*TOGETHER, "--train-text-encoder", "--dropout", "0.1", "--placeholder-frac", "0.5"),
            ],
        },
        draws=["--learning-rate", "1e-4", "--random-flip", "--train-text-encoder"],
        previews=PREVIEWS,
    ),
    "custom-diffusion": Contract(
        settings={
            "--model": "{sd}",
            "--resolution": 32,
            "--placeholder-token": "<thing> <other>",
            "--caption": "'a <thing> circle, an <other>'",
            "--prior-preservation": "",
            "--class-data": "{pictures}",
            "--num-class-images": 11,
            "--learning-rate": "1e-3",
            **NO_PREVIEWS,
        },
        weights="pytorch_custom_diffusion_weights.safetensors",
        variants={"queries and outputs, flips": [*TOGETHER, "--trained-attention", "crossattn", "--random-flip"]},
        draws=["--learning-rate", "1e-4", "--random-flip", "--no-center-crop", "--prior-loss-weight", "0.5"],
        previews=PREVIEWS,
    ),
    "textual-inversion": Contract(
        settings={
            "--model": "{sd}",
            "--resolution": 32,
            "--placeholder-token": "<thing>",
            "--num-vectors": 2,
            **NO_PREVIEWS,
        },
        weights="learned_embeds.safetensors",
        variants={"flips, norm": [*TOGETHER, "--random-flip", "--norm-weight", "0.1", "--snr-gamma", "5"]},
        draws=["--learning-rate", "1e-3", "--random-flip", "--learnable-property", "style", "--use-ema"],
        previews=PREVIEWS,
    ),
    "text-to-image": Contract(
        settings={"--model": "{sd}", "--resolution": 32, "--learning-rate": "1e-3", **NO_PREVIEWS},
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={"dream": [*TOGETHER, "--dream"]},
        draws=["--learning-rate", "1e-5", "--random-flip", "--caption-dropout", "0.2", "--use-ema", "--dream"],
        previews=PREVIEWS,
    ),
    "controlnet": Contract(
        settings={"--model": "{sd}", "--resolution": 32, "--condition": "edges", **NO_PREVIEWS},
        weights="diffusion_pytorch_model.safetensors",
        variants={"a mask, crops, flips": [*TOGETHER, "--condition", "mask", "--random-flip", "--no-center-crop"]},
        draws=[*STEADY, "--random-flip", "--caption-dropout", "0.2", "--condition", "mask", "--snr-gamma", "5"],
        previews=PREVIEWS,
    ),
    "t2i-adapter": Contract(
        settings={"--model": "{sd}", "--resolution": 32, "--condition": "edges", **NO_PREVIEWS},
        weights="diffusion_pytorch_model.safetensors",
        variants=COMMON,
        draws=[*STEADY, "--random-flip", "--caption-dropout", "0.2", "--condition", "mask", "--use-ema"],
        previews=PREVIEWS,
    ),
    "instruct-pix2pix": Contract(
        settings={"--model": "{sd}", "--resolution": 32, "--learning-rate": "1e-3", **NO_PREVIEWS},
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={"dropout, flips": [*TOGETHER, "--conditioning-dropout", "0.2", "--random-flip", "--no-cache"]},
        draws=["--learning-rate", "1e-5", "--random-flip", "--conditioning-dropout", "0.2", "--use-ema"],
        previews=PREVIEWS,
    ),
    "lcm": Contract(
        settings={"--model": "{sd}", "--resolution": 32, "--learning-rate": "1e-3", **NO_PREVIEWS},
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={"l2, flips": [*WORKERS, "--loss-type", "l2", "--random-flip", "--no-center-crop"]},
        draws=[*STEADY, "--random-flip", "--caption-dropout", "0.2"],
        previews=PREVIEWS,
    ),
    "lcm, adapters": Contract(
        method="lcm",
        settings={"--model": "{sd}", "--resolution": 32, "--lora": "", "--rank": 4, **NO_PREVIEWS},
        weights="pytorch_lora_weights.safetensors",
        variants={"dropout, workers, accumulation": ["--dropout", "0.1", *WORKERS]},
        draws=[*STEADY, "--random-flip", "--w-max", "8"],
        previews=PREVIEWS,
    ),
    "guidance-distillation": Contract(
        settings={"--model": "{sd}", "--resolution": 32, "--sampling-steps": "2 1", "--num-validation-images": 0},
        weights="unet/diffusion_pytorch_model.safetensors",
        # Phases of 3 of 10 steps: the kill is after the second one has begun
        variants={"average, flips": [*TOGETHER, "--random-flip", "--no-center-crop"]},
        draws=[*STEADY, "--random-flip", "--caption-dropout", "0.2", "--phase-steps", "2"],
        previews=PREVIEWS,
    ),
    "reflow": Contract(
        settings={"--model": "tiny-flow", "--resolution": 32, "--teacher-steps": 2, **NO_PREVIEWS},
        weights="transformer/diffusion_pytorch_model.safetensors",
        variants={"average, flips": [*TOGETHER, "--random-flip", "--no-center-crop"]},
        draws=[*STEADY, "--random-flip", "--caption-dropout", "0.2", "--loss-type", "huber"],
        previews=PREVIEWS,
    ),
    "reflow, adapters": Contract(
        method="reflow",
        settings={"--model": "tiny-flow", "--resolution": 32, "--teacher-steps": 2, "--lora": "", **NO_PREVIEWS},
        weights="pytorch_lora_weights.safetensors",
        variants={"dropout, workers, accumulation": ["--dropout", "0.1", *WORKERS]},
        draws=[*STEADY, "--random-flip"],
        previews=PREVIEWS,
    ),
    "ddpm": Contract(
        settings=SMALL | NO_PREVIEWS,
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={
            "classes, dropout": [
                *(*TOGETHER, "--class-column", "text", "--class-dropout", "0.3", "--dropout", "0.1"),
            ],
            "random crops, flips, velocity, learned variance, no average": [
                *("--no-use-ema", "--no-center-crop", "--random-flip", "--prediction-type", "v_prediction"),
                *("--variance-type", "learned_range"),
            ],
        },
        draws=[
            *(*STEADY, "--random-flip", "--no-center-crop", "--noise-offset", "0.05", "--input-perturbation", "0.1"),
            *("--class-column", "text", "--class-dropout", "0.3", "--snr-gamma", "5"),
        ],
        previews=PREVIEWS,
    ),
    "super-resolution": Contract(
        settings=SMALL | NO_PREVIEWS,
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={
            "dropout, heads, crops, flips": [
                *(*TOGETHER, "--dropout", "0.1", "--attention-head-dim", "4", "--no-center-crop", "--random-flip"),
            ],
        },
        draws=[*STEADY, "--random-flip", "--noise-offset", "0.05", "--snr-gamma", "5", "--max-noise-level", "900"],
        previews=PREVIEWS,
    ),
    "progressive": Contract(
        settings={
            "--model": "{pixels}",
            "--resolution": 16,
            "--sampling-steps": "2 1",
            "--num-validation-images": 0,
        },
        weights="unet/diffusion_pytorch_model.safetensors",
        # Phases of 3 of 6 steps and of 2 of 4: the kills are in the second one
        variants={"average, flips": [*TOGETHER, "--random-flip", "--no-center-crop"]},
        draws=[*STEADY, "--random-flip", "--phase-steps", "2"],
        previews=PREVIEWS,
    ),
    "consistency": Contract(
        settings=SMALL | NO_PREVIEWS,
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={
            "classes, dropout": [
                *(*TOGETHER, "--class-column", "text", "--dropout", "0.1", "--target-decay", "0.9"),
            ],
        },
        draws=[*STEADY, "--random-flip"],
        previews=PREVIEWS,
    ),
    "consistency, distilled": Contract(
        method="consistency",
        settings={"--model": "{pixels}", "--resolution": 16, "--target-decay": 0.9, **NO_PREVIEWS},
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={"plain, the first paper's": ["--no-use-ema", "--match-steps", "9", *FIRST]},
        draws=[*STEADY, "--random-flip"],
        previews=PREVIEWS,
    ),
    "autoencoder": Contract(
        settings={"--model": "{sd}", "--resolution": 32, "--num-validation-images": 0},
        weights="diffusion_pytorch_model.safetensors",
        variants={
            "both halves, a game": [
                *(*TOGETHER, "--train-encoder", "--disc-scale", "0.5", "--disc-channels", "8", "--disc-start", "3"),
                *("--perceptual-scale", "0.1", "--rec-loss", "l2", "--random-flip"),
            ],
        },
        draws=[
            *(*STEADY, "--random-flip", "--train-encoder", "--disc-scale", "0.5", "--disc-channels", "8"),
            *("--perceptual-scale", "0.1"),
        ],
        previews=PREVIEWS,
    ),
    "clip": Contract(
        settings={
            "--resolution": 16,
            "--hidden-size": 32,
            "--image-layers": 1,
            "--text-layers": 1,
            "--projection-dim": 16,
            "--lr-scheduler": "constant",
        },
        weights="model.safetensors",
        variants={
            "chunks, noise, average, flips": [
                *("--dataloader-num-workers", "2", "--chunk-size", "1"),
                "--noised",
                "--use-ema",
                "--random-flip",
            ]
        },
        draws=[*STEADY, "--random-flip", "--no-center-crop", "--use-ema"],
        chunks=True,
    ),
    "prior": Contract(
        settings={"--clip-model": "{clip}", "--resolution": 16, "--num-layers": 1, "--lr-scheduler": "constant"},
        weights="prior/diffusion_pytorch_model.safetensors",
        variants={"flips, crops, no cache": [*TOGETHER, "--random-flip", "--no-center-crop", "--snr-gamma", "5"]},
        draws=[*STEADY, "--random-flip", "--use-ema"],
    ),
    "prior, adapters": Contract(
        method="prior",
        settings={"--model": "{prior}", "--resolution": 16, "--lora": "", "--lr-scheduler": "constant"},
        weights="pytorch_lora_weights.safetensors",
        variants={"dropout, workers, accumulation": ["--dropout", "0.1", *WORKERS]},
        draws=[*STEADY, "--random-flip"],
    ),
    "image-decoder": Contract(
        settings={"--model": "{sd}", "--clip-model": "{clip}", "--resolution": 32, **NO_PREVIEWS},
        weights="unet/diffusion_pytorch_model.safetensors",
        variants={"flips, crops, no cache": [*TOGETHER, "--random-flip", "--no-center-crop", "--snr-gamma", "5"]},
        draws=[*STEADY, "--random-flip", "--use-ema", "--embedding-dropout", "0.3", "--noise-offset", "0.05"],
        previews=PREVIEWS,
    ),
    "image-decoder, adapters": Contract(
        method="image-decoder",
        settings={"--model": "{decoder}", "--clip-model": "{prior}", "--resolution": 32, "--lora": "", **NO_PREVIEWS},
        weights="pytorch_lora_weights.safetensors",
        variants={"dropout, workers, accumulation": ["--dropout", "0.1", *WORKERS]},
        draws=[*STEADY, "--random-flip"],
        previews=PREVIEWS,
    ),
    "classifier": Contract(
        settings=SMALL | {"--class-column": "text", "--attention-head-dim": 8},
        weights="diffusion_pytorch_model.safetensors",
        variants={"dropout, flips": [*TOGETHER, "--dropout", "0.1", "--random-flip"]},
        draws=[*STEADY, "--random-flip", "--no-center-crop", "--use-ema"],
    ),
}

METHODS = {contract.method or name: name for name, contract in RECIPES.items()}
"""Each method, and one of its rows."""


def command(recipe: str, places: Places, out: Path, *options: str) -> list[str]:
    """The command line of a short run of ``recipe`` into ``out``; later options win over its own."""
    settings: dict[str, object] = {
        "--dataset": "{pictures}",
        "--output-dir": out,
        "--steps": 6,
        "--train-batch-size": 2,
        "--learning-rate": "1e-2",
        "--dataloader-num-workers": 0,
        "--log-steps": 2,
        "--checkpointing-steps": 2,
        **RECIPES[recipe].settings,
    }
    given = {option.partition("=")[0] for option in options}
    words = [
        word
        for flag, value in settings.items()
        if flag not in given
        for word in (flag, *shlex.split(str(value).format(**places._asdict())))
    ]
    return [RECIPES[recipe].method or recipe, *words, *options]
