"""How well a model enlarges small pictures of the toy world, clean ones and flawed ones, beside bicubic enlargement."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import IFSuperResolutionPipeline
from PIL import Image
from torch import Tensor

from sdtune.data import toy_world
from sdtune.data.further import shrunk, to_image
from sdtune.data.images import to_tensor
from sdtune.models.perceptual import psnr
from sdtune.run.sampling_file import SAMPLING, Sampling
from sdtune.sampling.enlarge import enlarge

FLAW = 0.2
"""Standard deviation of the noise on flawed small pictures, whose values are in [-1, 1]."""
LEVEL = 120
"""The noise level that hides it: a timestep of squaredcos_cap_v2 whose noise is about as strong."""


def enlarges_pictures(folder: Path, n: int = 30, seed: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """PSNR in decibels of ``n`` pictures that no model has seen, enlarged bicubically and by a model.

    Args:
        folder: run of `sdtune super-resolution`.
    """
    pipe: Any = IFSuperResolutionPipeline.from_pretrained(folder)
    how = Sampling.read(folder / SAMPLING)
    assert how is not None and how.factor is not None
    side = pipe.unet.config.sample_size
    true = torch.stack([picture(k, seed, side) for k in range(n)])
    noise = torch.randn(n, 3, side // how.factor, side // how.factor, generator=torch.Generator().manual_seed(seed))
    bicubic, ours = {}, {}
    for kind, flaw, level in (("clean", 0.0, 0), ("flawed", FLAW, LEVEL)):
        small = [to_image(shrunk(x, how.factor) + flaw * part) for x, part in zip(true, noise, strict=True)]
        name = f"PSNR of {kind} pictures"
        bicubic[name] = quality([image.resize((side, side), Image.Resampling.BICUBIC) for image in small], true)
        drawn = enlarge(pipe, small, range(n), how.factor, steps=how.steps, noise_level=level, batch_size=10)
        ours[name] = quality(drawn, true)
    return bicubic, ours


def picture(k: int, seed: int, side: int) -> Tensor:
    """Picture k of those that are measured: ``[3, side, side]`` in [-1, 1], every other one of a new shape."""
    shapes = toy_world.NEW_SHAPES if k % 2 else toy_world.SHAPES
    scene = toy_world.random_scene(np.random.default_rng([seed, 9, k]), shapes, held_out=None)
    return to_tensor(toy_world.render(scene), side, side, 0.5, 0.5, False, "lanczos")


def quality(images: Sequence[Image.Image], true: Tensor) -> float:
    """Mean PSNR of images of ``true`` ``[N, 3, H, W]``."""
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    return float(psnr(pixels, true).mean())
