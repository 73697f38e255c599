"""Reads and writes adapter files of every format."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats import comfyui, diffusers_file, embedding, kohya, metadata, peft_folder, peft_settings
from sdtune.models.formats.neutral import PARTS, AdapterFile, Module
from sdtune.models.formats.tensor_file import copies, load, locate, reproducible
from sdtune.run.usage import ATTENTION

WRITERS: dict[str, Callable[[AdapterFile], dict[str, Tensor]]] = {
    "diffusers": diffusers_file.tensors,
    "kohya": kohya.tensors,
    "comfyui": comfyui.tensors,
}
HOLD_WORDS = ("kohya", "comfyui")
"""Formats that have a place for learned words beside an adapter."""


def read(where: Path | str, option: str = "") -> AdapterFile:
    """An adapter of any known format, by file, folder, run folder or Hub id.

    Args:
        option: what an error begins with, such as ``--adapter``.

    Raises:
        UserError: a pickle, a file that is not safetensors, unknown keys, missing tensors, numbers that are not finite.
    """
    if Path(where).is_dir() and (folders := peft_folders(Path(where))):
        return read_peft(folders)
    path = locate(where, option=option)
    if (path.parent / peft_folder.CONFIG).is_file() and path.name == peft_folder.WEIGHTS:
        return read_peft({None: path.parent})
    tensors, about = load(path)
    if embedding.is_embedding(tensors):
        raise UserError(f"{option} {where}: holds a learned word, not an adapter: give --embedding {where}".strip())
    words = embedding.bundled(path, tensors)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(embedding.BUNDLE)}
    return replace(read_tensors(path, tensors, about), words=words)


def read_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> AdapterFile:
    """An adapter from the tensors of one file, whose keys say which format it is."""
    if any("_custom_diffusion" in key for key in tensors):
        raise UserError(
            f"{path}: holds weights of Custom Diffusion, which are no adapter to convert or merge; sdtune sample takes "
            f"them with --adapter, as a folder or under the name {ATTENTION}"
        )
    if any(kohya.place(key) for key in tensors):
        return kohya.read(path, tensors, about)
    if any(key.startswith(tuple(comfyui.PREFIXES)) for key in tensors):
        return comfyui.read(path, tensors, about)
    if any(key.startswith(peft_folder.PREFIX) for key in tensors):
        raise UserError(f"{path}: PEFT's tensors need their {peft_folder.CONFIG} in the same folder, for alpha")
    return diffusers_file.read(path, tensors, about)


def peft_folders(path: Path) -> dict[str | None, Path]:
    """Folders in PEFT's layout by part: ``path`` itself (None), or its ``unet``, ``text_encoder``, ..."""
    if (path / peft_folder.CONFIG).is_file():
        return {path.name if path.name in PARTS else None: path}
    return {part: path / part for part in PARTS if (path / part / peft_folder.CONFIG).is_file()}


def read_peft(folders: Mapping[str | None, Path]) -> AdapterFile:
    parts: dict[str, dict[str, Module]] = {}
    about: dict[str, str] = {}
    targets: dict[str, list[str]] = {}
    for part, folder in folders.items():
        file = folder / peft_folder.WEIGHTS
        if not file.is_file() and any(folder.glob("*.bin")):
            file = locate(next(folder.glob("*.bin")))
        try:
            text = (folder / peft_folder.CONFIG).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / peft_folder.CONFIG}: cannot be read ({error})") from None
        config = peft_settings.settings_of(folder / peft_folder.CONFIG, text)
        tensors, own = load(file)
        with peft_settings.errors_of(folder / peft_folder.CONFIG):
            found = peft_folder.read(file, part, tensors, config)
            targets |= {name: peft_settings.targets_of(config) for name in found}
        parts |= found
        about |= own
    return AdapterFile(parts, about, "peft", targets={k: v for k, v in targets.items() if v})


def write(path: Path, adapter: AdapterFile, to: str) -> None:
    """Write ``adapter`` to ``path`` (a file; for ``peft`` a folder). The same content gives the same bytes.

    Args:
        to: ``diffusers``, ``peft``, ``kohya`` or ``comfyui``.

    Raises:
        UserError: the format cannot hold this kind of adapter.
    """
    about = {"format": "pt"} | metadata.kohya(adapter)
    if any(m.base_norm for m in adapter.modules().values()):
        if to != "comfyui":
            raise UserError(f"--to {to}: cannot hold DoRA whose norms were made for ComfyUI alone; convert its source")
        about[kohya.BASE_NORM] = "base"
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
    words = embedding.bundle(adapter.words) if to in HOLD_WORDS else {}
    path.write_bytes(reproducible(copies(WRITERS[to](adapter) | words), about))


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
