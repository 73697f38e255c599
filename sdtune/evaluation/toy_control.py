"""How well a pipeline follows edges or instructions in the toy world: draws, reads what was drawn, and counts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdtune.data import toy_pairs, toy_world
from sdtune.evaluation.toy_score import share
from sdtune.sampling.generate import generate

CLOSE = 0.7
"""Overlap from which on a shape counts as the one that was asked for, in its place."""


def follows_edges(
    pipeline: Any, n: int = 40, shapes: Sequence[str] = (), guidance: float = 3.0, steps: int = 25, seed: int = 0
) -> dict[str, float]:
    """Agreement of ``n`` images with the edges that they were to follow, and with their captions.

    Args:
        pipeline: one that takes an image, or the base, which sees the caption alone.
        shapes: ask for these alone, in turn; else for captions of known shapes that the base never saw.
    """
    asked = toy_world.held_out_captions(n, seed)
    if shapes:
        lists = [toy_world.held_out_captions(n, seed, shape) for shape in shapes]
        asked = [lists[k % len(lists)][k] for k in range(n)]
    captions, scenes = zip(*asked, strict=True)
    edges = [[toy_pairs.edge_image(toy_world.render(scene)).convert("RGB")] for scene in scenes]
    takes_images = bool({"controlnet", "adapter"} & pipeline.components.keys())
    images = generate(
        pipeline,
        captions,
        [seed + k for k in range(n)],
        steps=steps,
        guidance_scale=guidance,
        batch_size=20,
        images=edges if takes_images else (),
    )
    overlaps = [toy_world.overlap(image, scene) for image, scene in zip(images, scenes, strict=True)]
    found = [(toy_world.read(image), scene) for image, scene in zip(images, scenes, strict=True)]
    return {
        "overlap": float(np.mean(overlaps)),
        "close": share(one > CLOSE for one in overlaps),
        "shape": share(reading.shape == scene.shape for reading, scene in found),
        "colour": share(reading.colour == scene.colour for reading, scene in found),
        "ground": share(reading.ground == scene.ground for reading, scene in found),
    }


def follows_edits(
    pipeline: Any, n: int = 60, guidance: float = 2.0, image_guidance: float = 2.0, steps: int = 25, seed: int = 0
) -> dict[str, float]:
    """Shares of ``n`` edits that did what was asked, left the rest as it was, and both.

    The rest is kept if the two other attributes are those of before, and the shape is where it is asked for.
    """
    edits = [toy_pairs.random_edit(np.random.default_rng([seed, 11, k])) for k in range(n)]
    images = generate(
        pipeline,
        [edit.instruction for edit in edits],
        [seed + k for k in range(n)],
        steps=steps,
        guidance_scale=guidance,
        image_guidance_scale=image_guidance,
        batch_size=20,
        images=[[toy_world.render(edit.before)] for edit in edits],
    )
    right, kept = [], []
    for edit, image in zip(edits, images, strict=True):
        reading = toy_world.read(image)
        same = [
            getattr(reading, name) == getattr(edit.after, name)
            for name in ("shape", "colour", "ground")
            if name != edit.attribute
        ]
        right.append(getattr(reading, edit.attribute) == getattr(edit.after, edit.attribute))
        kept.append(all(same) and toy_world.overlap(image, edit.after) > CLOSE)
    return {
        "right": share(right),
        "kept": share(kept),
        "both": share(a and b for a, b in zip(right, kept, strict=True)),
    }
