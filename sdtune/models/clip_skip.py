"""Clip skip: prompts are read at an earlier layer of the text encoder of Stable Diffusion 1 and 2.

Layers are counted from the last, which is 1, as kohya's scripts and user interfaces count. The layers behind it are
taken out of the encoder, so that whatever uses it reads the same, and a pipeline that is saved needs no option.
"""

import re
from dataclasses import replace
from typing import Any

from transformers import CLIPTextModel

from sdtune.config.sections import UserError
from sdtune.models.formats.neutral import AdapterFile

LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")


def skip_layers(text_encoder: Any, clip_skip: int, model: str) -> None:
    """Take the layers behind the one that is read out of a text encoder.

    Args:
        model: what the base is called in an error.

    Raises:
        UserError: the encoder is no CLIP, or has fewer layers.
    """
    if not isinstance(text_encoder, CLIPTextModel):
        raise UserError(f"--clip-skip {clip_skip}: the text encoder of {model} is no CLIP; leave it out")
    layers = text_encoder.encoder.layers
    if clip_skip > len(layers):
        raise UserError(f"--clip-skip {clip_skip}: the text encoder of {model} has {len(layers)} layers")
    kept = len(layers) - clip_skip + 1
    text_encoder.encoder.layers = layers[:kept]
    text_encoder.config.num_hidden_layers = kept


def of_layers(adapter: AdapterFile, count: int) -> AdapterFile:
    """An adapter without its modules in layers of the text encoder from ``count`` on, which have been taken out."""
    own = adapter.parts.get("text_encoder", {})
    left = {name: m for name, m in own.items() if not (found := LAYER.match(name)) or int(found[1]) < count}
    parts = {part: left if part == "text_encoder" else modules for part, modules in adapter.parts.items()}
    return replace(adapter, parts={part: modules for part, modules in parts.items() if modules})
