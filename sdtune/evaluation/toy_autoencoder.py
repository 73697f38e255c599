"""How well an autoencoder keeps pictures of the toy world: encodes and decodes them, reads them, and counts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdtune.data import toy_world
from sdtune.data.further import to_image
from sdtune.data.images import to_tensor
from sdtune.evaluation.toy_score import share
from sdtune.models.perceptual import psnr

KNOWN = "known shapes"


@torch.no_grad()
def keeps_pictures(vae: Any, n: int = 100, seed: int = 0) -> dict[str, float]:
    """Of ``n`` pictures of each kind (stars, hearts, known shapes): decibels of PSNR, and the share read rightly.

    Args:
        vae: of diffusers, on the CPU; the mean of its posterior is decoded.
    """
    found: dict[str, float] = {}
    kinds = {"stars": ("star",), "hearts": ("heart",), KNOWN: toy_world.SHAPES}
    for number, (kind, shapes) in enumerate(kinds.items()):
        scenes = [
            toy_world.random_scene(np.random.default_rng([seed, 8, number, k]), shapes, held_out=None) for k in range(n)
        ]
        x = torch.stack([pixels(scene) for scene in scenes])
        y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(10)]).clamp(-1, 1)
        found[f"PSNR of {kind}"] = float(psnr(y, x).mean())
        found[f"{kind} read"] = right(y, scenes)
    return found


def pixels(scene: toy_world.Scene) -> Tensor:
    """The picture of a scene: ``[3, 64, 64]`` in [-1, 1]."""
    return to_tensor(toy_world.render(scene), 64, 64, 0.5, 0.5, False, "lanczos")


def right(y: Tensor, scenes: Sequence[toy_world.Scene]) -> float:
    """Share of pictures ``[N, 3, H, W]`` that show the shape of their scene."""
    return share(toy_world.read(to_image(image)).shape == scene.shape for image, scene in zip(y, scenes, strict=True))
