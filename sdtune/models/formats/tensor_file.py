"""Safetensors files of adapters and embeddings: found by path or Hub id, read with every number checked, written."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.families import PICKLES

FILE = "pytorch_lora_weights.safetensors"
"""The adapter in a run's folder."""
LONGEST_KEY = 500
"""Characters of a tensor's name; those of published models have about a hundred."""


def locate(where: str | Path, name: str = FILE, option: str = "") -> Path:
    """The ``.safetensors`` file that is given as file, folder, run folder or ``user/name[/file]`` on the Hub.

    Args:
        name: the file to take from a folder or repository that has several.
        option: what an error begins with, such as ``--adapter``.

    Raises:
        UserError: a pickle, no such file, or a folder with several.
    """
    path, asked = Path(where).expanduser(), f"{option} {where}".strip()
    if path.is_dir():
        files = [path / name] if (path / name).is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{asked}: no .safetensors in it; a run writes its own when it ends")
        if len(files) > 1:
            raise UserError(f"{asked}: {len(files)} .safetensors in it; name the file")
        return files[0]
    if path.suffix in PICKLES:
        raise UserError(
            f"{asked}: a pickle, which can run code when it is read; convert it once, on a machine you can spare: "
            'python -c "import sys, torch; from safetensors.torch import save_file; '
            'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" '
            f"{path.name} {path.stem}.safetensors"
        )
    return path if path.is_file() else download(str(where), name, asked)


def download(where: str, name: str, asked: str) -> Path:
    """The file of ``user/name[/file]`` on the Hub; ``UserError`` that begins with ``asked``."""
    import huggingface_hub

    user, _, rest = where.partition("/")
    repo, _, file = rest.partition("/")
    if not (user and repo) or where.startswith((".", "/", "~")) or (where.endswith(".safetensors") and not file):
        raise UserError(f"{asked}: no such file or folder")
    try:
        return Path(huggingface_hub.hf_hub_download(f"{user}/{repo}", file or name))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{asked}: no such file or folder, and not on the Hub: {why}") from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; 8-bit floats come as fp16, which holds them exactly.

    Raises:
        UserError: no safetensors file, an empty one, names of absurd length, or numbers that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error})") from None
    if not tensors:
        raise UserError(f"{path}: holds no tensor")
    if bad := [key for key in tensors if len(key) > LONGEST_KEY or not key.isprintable()]:
        raise UserError(
            f"{path}: the name of a tensor has more than {LONGEST_KEY} characters or unprintable ones: {bad[0][:60]!a}"
        )
    tensors = {key: t.half() if t.is_floating_point() and t.element_size() == 1 else t for key, t in tensors.items()}
    refuse_non_finite(path, tensors)
    return tensors, about


def refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """``UserError`` that counts the numbers that are NaN or infinite, and names the first tensor with one."""
    bad = {key: int((~t.isfinite()).sum()) for key, t in tensors.items() if t.is_floating_point()}
    if bad := {key: count for key, count in bad.items() if count}:
        first = next(iter(sorted(bad)))
        raise UserError(
            f"{path}: {sum(bad.values()):,} numbers in {len(bad)} of its {len(tensors)} tensors are NaN or infinite, "
            f"the first in {first}; the file is damaged, or its training diverged"
        )


def reproducible(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose header is sorted; the library writes its metadata in random order."""
    raw = save(dict(sorted(tensors.items())), dict(metadata))
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies without shared memory, which safetensors refuses; two modules may share a factor."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def json_object(text: str | None) -> dict[str, Any]:
    """The JSON object in a metadata entry; empty where there is none that can be read."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
