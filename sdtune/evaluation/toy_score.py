"""How well a pipeline follows captions of `toy_world`: generates images, reads them, and counts."""

from collections.abc import Iterable
from typing import Any

from PIL.Image import Image

from sdtune.data import toy_world
from sdtune.sampling.generate import generate

GUIDANCE = 3.0
STEPS = 25


def score(
    pipeline: Any,
    n: int = 200,
    shape: str | None = None,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    name: str | None = None,
) -> tuple[dict[str, float], list[Image], list[str]]:
    """Shares of ``n`` images of held-out captions that show what was asked for; the images; and their captions.

    Args:
        shape: ask for this shape alone, in every colour and on every ground; its share is the concept score.
        name: word for the shape in the captions, in place of its own name.
    """
    captions, scenes = zip(*toy_world.held_out_captions(n, seed, shape), strict=True)
    if shape and name:
        captions = tuple(caption.replace(shape, name) for caption in captions)
    seeds = [seed + k for k in range(n)]
    images = generate(pipeline, captions, seeds, steps=steps, guidance_scale=guidance, batch_size=25)
    found = [(toy_world.read(image), scene) for image, scene in zip(images, scenes, strict=True)]
    shares = {
        "shape": share(reading.shape == scene.shape for reading, scene in found),
        "colour": share(reading.colour == scene.colour for reading, scene in found),
        "ground": share(reading.ground == scene.ground for reading, scene in found),
        "size": share(reading.size == scene.size for reading, scene in found),
    }
    # Of shape, colour and ground
    shares["all"] = share((r.shape, r.colour, r.ground) == (s.shape, s.colour, s.ground) for r, s in found)
    # Any shape of the base's world, of the colour and on the ground asked for
    shares["known"] = share(
        r.shape in toy_world.SHAPES and (r.colour, r.ground) == (s.colour, s.ground) for r, s in found
    )
    return shares, images, list(captions)


def share(hits: Iterable[bool]) -> float:
    counted = [bool(hit) for hit in hits]
    return sum(counted) / len(counted)
