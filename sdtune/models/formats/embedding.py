"""Textual-inversion files: the learned vectors of one token (Gal et al. 2022).

diffusers has ``{"<token>": [n, dim]}``, A1111 ``emb_params`` and the token in the file's name, SDXL and ComfyUI
``clip_l`` and ``clip_g``, a table for each text encoder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats import metadata
from sdtune.models.formats.tensor_file import load, locate, reproducible
from sdtune.run.usage import EMBEDDING

ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
WIDTH_OF_CLIP_H = 1024


@dataclass(frozen=True)
class Embedding:
    token: str
    parts: dict[str, Tensor]
    """Text encoder to its vectors (n, dim)."""
    metadata: dict[str, str]
    format: str


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are names of text encoders, ``emb_params``, or one table under a name without dots."""
    names = set(tensors)
    alone = len(names) == 1 and all("." not in n and t.ndim <= 2 for n, t in tensors.items())
    return names == {"emb_params"} or names <= ENCODERS.keys() or alone


def read(path: Path, token: str | None = None) -> Embedding | None:
    """The embedding in a file, or None if it holds something else.

    Args:
        token: the word it stands for, where the file does not say; else the file's name.
    """
    if path.is_dir() and not (path / EMBEDDING).is_file():
        return None
    path = path / EMBEDDING if path.is_dir() else path
    tensors, about = load(locate(path))
    if not is_embedding(tensors):
        return None
    tables = {name: t.reshape(-1, t.shape[-1]) for name, t in tensors.items() if t.ndim in (1, 2)}
    if bad := [n for n in tensors if n not in tables or not tensors[n].isfinite().all()]:
        raise UserError(f"{path}: {bad[0]} is not a table of finite vectors")
    if set(tables) <= ENCODERS.keys():
        parts = {ENCODERS[name]: table for name, table in tables.items()}
        return Embedding(token or about.get("token", path.stem), parts, about, "comfyui")
    (name, table), form = next(iter(tables.items())), "kohya" if "emb_params" in tables else "diffusers"
    own_name = about.get("token", path.stem) if form == "kohya" else name
    return Embedding(token or own_name, {"text_encoder": table}, about, form)


def write(path: Path, embedding: Embedding, to: str) -> None:
    """Write the file of ``to``; with two text encoders every format has ``clip_l`` and ``clip_g``.

    Raises:
        UserError: for PEFT, which has no textual inversion.
    """
    if to == "peft":
        raise UserError("--to peft: cannot hold a textual inversion; diffusers, kohya and comfyui can")
    tensors = {}
    for part, table in embedding.parts.items():
        by_encoder = (
            "clip_g" if part == "text_encoder_2" else "clip_h" if table.shape[1] == WIDTH_OF_CLIP_H else "clip_l"
        )
        alone = {"diffusers": embedding.token, "kohya": "emb_params"}.get(to, by_encoder)
        tensors[alone if set(embedding.parts) == {"text_encoder"} else by_encoder] = table.contiguous()
    about = {k: v for k, v in embedding.metadata.items() if not k.startswith(metadata.STALE)}
    path.write_bytes(reproducible(tensors, about | {"format": "pt", "token": embedding.token}))


def save(folder: Path, token: str, rows: Tensor, provenance: Mapping[str, Any]) -> Path:
    """Write ``learned_embeds.safetensors`` as diffusers reads it, atomically; equal rows give equal bytes."""
    path, new = folder / EMBEDDING, folder / f".{EMBEDDING}"
    about = {"sdtune": json.dumps(provenance, sort_keys=True)}
    write(new, Embedding(token, {"text_encoder": rows.detach().cpu()}, about, "diffusers"), "diffusers")
    new.replace(path)
    return path


def same(one: Embedding, other: Embedding | None) -> bool:
    return (
        other is not None
        and (one.token, one.parts.keys()) == (other.token, other.parts.keys())
        and all(torch.equal(one.parts[part], other.parts[part]) for part in one.parts)
    )
