"""What a prior and a decoder of unCLIP draw for captions of the toy world, read by the rules of that world."""

import torch
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

from sdtune.data import toy_world
from sdtune.evaluation.toy_clip import distinct
from sdtune.evaluation.toy_score import share

STEPS = 10
"""Of each pipeline; with 25 a good decoder draws one more of 40 colours rightly."""


@torch.no_grad()
def draws_captions(
    decoder: str, prior: str, n: int = 40, seed: int = 0, guidance_scale: float = 2.0, prior_guidance_scale: float = 1.0
) -> dict[str, float]:
    """Shares of ``n`` pictures, of held-out captions, that show the colour, the ground and the shape asked for.

    Args:
        decoder, prior: folders of the stock pipelines.
    """
    first, second = KandinskyV22PriorPipeline.from_pretrained(prior), KandinskyV22Pipeline.from_pretrained(decoder)
    pairs = distinct(n, seed)
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
    embeds = first(
        [caption for caption, _ in pairs],
        num_inference_steps=STEPS,
        guidance_scale=prior_guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    images = second(
        **embeds,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images
    found = [(toy_world.read(image), scene) for image, (_, scene) in zip(images, pairs, strict=True)]
    return {
        name: share(getattr(reading, name) == getattr(scene, name) for reading, scene in found)
        for name in ("colour", "ground", "shape")
    }
