"""Textual-inversion files: the learned vectors of one token (Gal et al. 2022).

diffusers has ``{"<token>": [n, dim]}``, A1111 ``emb_params`` and the token in the file's name, SDXL and ComfyUI
``clip_l`` and ``clip_g``, a table for each text encoder. Adapters of kohya's format may bring words along, under
``bundle_emb.<token>.`` and one of these keys.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats import metadata
from sdtune.models.formats.neutral import Embedding
from sdtune.models.formats.tensor_file import load, locate, reproducible
from sdtune.run.usage import EMBEDDING, ENCODERS, word_file

A1111 = ("emb_params", "string_to_param.*")
"""Keys of the one table of A1111's files, and of those converted from its pickles."""
WIDTH_OF_CLIP_H = 1024
BUNDLE = "bundle_emb."
MOST_VECTORS = 75
"""Vectors of a word: more do not fit into the text encoder's window of 77 tokens."""


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are names of text encoders, A1111's, or one table under a name without dots."""
    names = set(tensors)
    alone = len(names) == 1 and all("." not in n and t.ndim <= 2 for n, t in tensors.items())
    return (len(names) == 1 and names <= set(A1111)) or names <= ENCODERS.keys() or alone


def read(where: Path | str, token: str | None = None, option: str = "") -> Embedding | None:
    """The embedding in a file, or None if it holds something else.

    Args:
        token: the word it stands for; else what the metadata says; else the file's name, as A1111 has it.
        option: what an error begins with.
    """
    path = Path(where)
    if not option and path.is_dir() and not (path / EMBEDDING).is_file():
        return None
    path = locate(where, EMBEDDING, option)
    tensors, about = load(path)
    return embedding_of(path, tensors, about, token) if is_embedding(tensors) else None


def embedding_of(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str], token: str | None) -> Embedding:
    """The embedding in the tensors of a file.

    Raises:
        UserError: a tensor that is not a table of vectors, or a word that cannot be one.
    """
    for name, table in tensors.items():
        if table.ndim not in (1, 2) or not table.is_floating_point() or not table.numel():
            raise UserError(f"{path}: {name} is not a table of vectors, but {tuple(table.shape)} of {table.dtype}")
        if table.ndim == 2 and len(table) > MOST_VECTORS:
            raise UserError(f"{path}: {name} has {len(table)} vectors; a text encoder takes at most {MOST_VECTORS}")
    tables = {name: t.reshape(-1, t.shape[-1]) for name, t in tensors.items()}
    form = "comfyui" if set(tables) <= ENCODERS.keys() else "kohya" if set(tables) <= set(A1111) else "diffusers"
    parts = {ENCODERS.get(name, "text_encoder"): table for name, table in tables.items()}
    own = next(iter(tables)) if form == "diffusers" else about.get("token") or about.get("name") or path.stem
    word = (token or own).strip()
    if not word or not word.isprintable():
        raise UserError(f"{path}: its word {word!r} cannot stand in a prompt; sdtune convert gives it another: --token")
    return Embedding(word, parts, about, form)


def bundled(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Embedding, ...]:
    """The words that an adapter file brings along under ``bundle_emb.``."""
    by_token: dict[str, dict[str, Tensor]] = {}
    for key in sorted(k for k in tensors if k.startswith(BUNDLE)):
        token, _, name = key.removeprefix(BUNDLE).partition(".")
        by_token.setdefault(token, {})[name] = tensors[key]
    for token, own in by_token.items():
        if not (set(own) <= ENCODERS.keys() or (len(own) == 1 and set(own) <= set(A1111))):
            raise UserError(f"{path}: {BUNDLE}{token} has {', '.join(sorted(own)[:3])}, which no known embedding has")
    return tuple(embedding_of(path, own, {}, token) for token, own in by_token.items())


def keys_of(embedding: Embedding, to: str) -> dict[str, Tensor]:
    """The tensors of ``to``; with two text encoders every format has ``clip_l`` and ``clip_g``."""
    tensors = {}
    for part, table in embedding.parts.items():
        by_encoder = (
            "clip_g" if part == "text_encoder_2" else "clip_h" if table.shape[1] == WIDTH_OF_CLIP_H else "clip_l"
        )
        alone = {"diffusers": embedding.token, "kohya": "emb_params"}.get(to, by_encoder)
        tensors[alone if set(embedding.parts) == {"text_encoder"} else by_encoder] = table.contiguous()
    return tensors


def bundle(words: tuple[Embedding, ...]) -> dict[str, Tensor]:
    """The keys of words inside an adapter file."""
    return {f"{BUNDLE}{w.token}.{name}": table for w in words for name, table in keys_of(w, "kohya").items()}


def write(path: Path, embedding: Embedding, to: str) -> None:
    """Write the file of ``to``.

    Raises:
        UserError: for PEFT, which has no textual inversion.
    """
    if to == "peft":
        raise UserError("--to peft: cannot hold a textual inversion; diffusers, kohya and comfyui can")
    about = {k: v for k, v in embedding.metadata.items() if not k.startswith(metadata.STALE)}
    path.write_bytes(reproducible(keys_of(embedding, to), about | {"format": "pt", "token": embedding.token}))


def save(folder: Path, token: str, rows: Mapping[str, Tensor], provenance: Mapping[str, Any], k: int = 0) -> Path:
    """Write ``learned_embeds.safetensors`` as diffusers reads it, atomically; equal rows give equal bytes.

    Args:
        rows: the word's vectors ``[n, dim]`` in each text encoder, by the encoder's name.
        k: number of the word, from 0, where a run has several, each in a file of its own.
    """
    path = folder / word_file(k)
    new = path.with_name(f".{path.name}")
    about = {"sdtune": json.dumps(provenance, sort_keys=True)}
    write(
        new,
        Embedding(token, {name: table.detach().cpu() for name, table in rows.items()}, about, "diffusers"),
        "diffusers",
    )
    new.replace(path)
    return path


def same(one: Embedding, other: Embedding | None) -> bool:
    return (
        other is not None
        and (one.token, one.parts.keys()) == (other.token, other.parts.keys())
        and all(torch.equal(one.parts[part], other.parts[part]) for part in one.parts)
    )
