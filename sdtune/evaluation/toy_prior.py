"""How well a prior of unCLIP says in CLIP's space what pictures of captions of the toy world look like."""

from typing import Any

import torch
from diffusers import KandinskyV22PriorPipeline
from torch import Tensor
from torch.nn.functional import normalize

from sdtune.evaluation.toy_autoencoder import pixels
from sdtune.evaluation.toy_clip import distinct
from sdtune.evaluation.toy_score import share

STEPS = 25


@torch.no_grad()
def finds_embeddings(
    folder: str, n: int = 60, seed: int = 0, guidance_scale: float = 1.0
) -> tuple[dict[str, float], ...]:
    """Of ``n`` pictures of held-out triples, each of another caption: the mean cosine of the embedding drawn for the
    caption to that of the picture, and the share of captions whose embedding is nearest to that of their own picture.

    Returns the scores of the mean of all embeddings, which knows no caption, and those of the prior.
    """
    pipe = KandinskyV22PriorPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pairs = distinct(n, seed)
    pictures = embedded(pipe, torch.stack([pixels(scene) for _, scene in pairs]))
    drawn = pipe(
        [caption for caption, _ in pairs],
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).image_embeds
    return scores(pipe.prior.clip_mean.expand(n, -1), pictures), scores(drawn, pictures)


def embedded(pipe: Any, x: Tensor) -> Tensor:
    """Pixels ``[N, 3, side, side]`` in [-1, 1] -> embeddings ``[N, D]``."""
    seen = pipe.image_processor
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (seen.image_mean, seen.image_std))
    found: Tensor = pipe.image_encoder((x / 2 + 0.5 - mean) / std).image_embeds
    return found


def scores(drawn: Tensor, pictures: Tensor) -> dict[str, float]:
    cosines = normalize(drawn, dim=1) @ normalize(pictures, dim=1).T
    own = torch.arange(len(pictures))
    return {
        "cosine to its picture": cosines.diagonal().mean().item(),
        "picture of a caption": share((cosines.argmax(1) == own).tolist()),
    }
