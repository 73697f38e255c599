"""Reads and writes adapter files of every format."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats import comfyui, diffusers_file, kohya, metadata, peft_folder
from sdtune.models.formats.neutral import PARTS, AdapterFile
from sdtune.models.formats.tensor_file import copies, load, locate, reproducible

WRITERS: dict[str, Callable[[AdapterFile], dict[str, Tensor]]] = {
    "diffusers": diffusers_file.tensors,
    "kohya": kohya.tensors,
    "comfyui": comfyui.tensors,
}


def read(path: Path) -> AdapterFile:
    """An adapter file or folder of any known format.

    Raises:
        UserError: a pickle, a file that is not safetensors, unknown keys, or missing tensors.
    """
    if path.is_dir() and (folders := peft_folders(path)):
        return read_peft(path, folders)
    path = locate(path)
    tensors, about = load(path)
    if (path.parent / peft_folder.CONFIG).is_file() and path.name == peft_folder.WEIGHTS:
        return read_peft(path.parent, {None: path.parent})
    if any(place(key) for place in (kohya.place,) for key in tensors):
        return kohya.read(path, tensors, about)
    if any(key.startswith(peft_folder.PREFIX) for key in tensors):
        raise UserError(f"{path}: PEFT's tensors need their {peft_folder.CONFIG} in the same folder, for alpha")
    return diffusers_file.read(path, tensors, about)


def peft_folders(path: Path) -> dict[str | None, Path]:
    """Folders in PEFT's layout by part: ``path`` itself (None), or its ``unet``, ``text_encoder``, ..."""
    if (path / peft_folder.CONFIG).is_file():
        return {path.name if path.name in PARTS else None: path}
    return {part: path / part for part in PARTS if (path / part / peft_folder.CONFIG).is_file()}


def read_peft(path: Path, folders: dict[str | None, Path]) -> AdapterFile:
    parts, about = {}, {}
    for part, folder in folders.items():
        file = folder / peft_folder.WEIGHTS
        if not file.is_file() and any(folder.glob("*.bin")):
            file = locate(next(folder.glob("*.bin")))
        try:
            config: dict[str, Any] = json.loads((folder / peft_folder.CONFIG).read_text(encoding="utf-8"))
            tensors, own = load(file)
            parts |= peft_folder.read(file, part, tensors, config)
        except (ValueError, AttributeError, TypeError, re.error) as error:
            raise UserError(f"{folder / peft_folder.CONFIG}: cannot be read ({error})") from None
        about |= own
    return AdapterFile(parts, about, "peft")


def write(path: Path, adapter: AdapterFile, to: str) -> None:
    """Write ``adapter`` to ``path`` (a file; for ``peft`` a folder). The same content gives the same bytes.

    Args:
        to: ``diffusers``, ``peft``, ``kohya`` or ``comfyui``.

    Raises:
        UserError: the format cannot hold this kind of adapter.
    """
    about = {"format": "pt"} | metadata.kohya(adapter)
    if to == "peft":
        for part, modules in adapter.parts.items():
            config, fitted = peft_folder.config(part, modules, metadata.base_of(adapter))
            folder = path / part
            folder.mkdir(parents=True, exist_ok=True)
            content = reproducible(copies(peft_folder.tensors(part, fitted)), about)
            (folder / peft_folder.WEIGHTS).write_bytes(content)
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
            (folder / peft_folder.CONFIG).write_text(f"{text}\n", encoding="utf-8")
        return
    path.write_bytes(reproducible(copies(WRITERS[to](adapter)), about))


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A hidden name to write to, in the folder of ``path``: renamed to ``path`` if the block succeeds, else deleted."""
    new = path.with_name(f".{path.name}")
    try:
        yield new
        new.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink(missing_ok=True)
