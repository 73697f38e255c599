"""How well a CLIP knows the toy world: finds pictures and captions among each other, and names what a picture shows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sdtune.data import toy_world
from sdtune.diffusion.guides import embedded, opaque_squares
from sdtune.evaluation.toy_autoencoder import pixels
from sdtune.evaluation.toy_score import share
from sdtune.models.vision import load_clip

NAMED = {"colour": toy_world.COLOURS, "ground": toy_world.GROUNDS, "shape": toy_world.SHAPES}
"""What a picture shows, and the words for it."""


@torch.no_grad()
def knows_pictures(folder: str, n: int = 64, seed: int = 0) -> dict[str, float]:
    """Shares of ``n`` pictures, each of another caption, that the CLIP in a folder takes rightly.

    The triples of colour, shape and ground are those that are never trained on. The caption of a picture is sought
    among all ``n``, and the picture of a caption. A colour is sought among the captions that differ in nothing else,
    and so are ground and shape.
    """
    network, tokenizer = load_clip(folder)
    pairs = distinct(n, seed)
    scenes = [scene for _, scene in pairs]
    device = next(network.parameters()).device
    seen = opaque_squares(torch.stack([pixels(scene) for scene in scenes]).to(device), network.side)
    images = normalize(network(seen).float(), dim=1)

    def cosines(captions: Sequence[str]) -> Tensor:
        return images @ embedded(network.model, tokenizer, list(captions)).T

    among = cosines([caption for caption, _ in pairs])
    own = torch.arange(n, device=device)
    found = {
        "caption of a picture": share((among.argmax(1) == own).tolist()),
        "picture of a caption": share((among.argmax(0) == own).tolist()),
    }
    for name, words in NAMED.items():
        captions = [toy_world.caption(changed(scene, name, word)) for scene in scenes for word in words]
        texts = embedded(network.model, tokenizer, captions).view(n, len(words), -1)
        best = torch.einsum("nd,nwd->nw", images, texts).argmax(1).tolist()
        found[name] = share(words[k] == getattr(scene, name) for k, scene in zip(best, scenes, strict=True))
    return found


def distinct(n: int, seed: int) -> list[tuple[str, toy_world.Scene]]:
    """``n`` captions of held-out triples, no two equal, with their scenes."""
    drawn: dict[str, toy_world.Scene] = {}
    for caption, scene in toy_world.held_out_captions(8 * n, seed):
        if len(drawn) < n:
            drawn.setdefault(caption, scene)
    return list(drawn.items())


def changed(scene: toy_world.Scene, name: str, word: str) -> toy_world.Scene:
    """A scene with another colour, ground or shape."""
    other: dict[str, Any] = {name: word}
    return replace(scene, **other)
