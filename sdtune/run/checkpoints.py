"""Checkpoints: the state of training, complete or not at all.

A checkpoint is a folder of safetensors and JSON files, without pickles. It is written under another name, flushed to
the disk and renamed. The manifest with the size and checksum of every file is written last. Older checkpoints are
removed only after that.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtune.config.sections import RunFailed, UserError
from sdtune.run.files import umask

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{6,})")
"""Names of the checkpoints that `save` writes; a folder with another name, such as a copy, belongs to the user."""
UNFINISHED = re.compile(r"\.new-\d{6,}-\d+|\.old-step-\d{6,}")
"""Names of what an interrupted save or removal leaves."""


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write ``root/step-000123`` with a file of each group of tensors, then prune to the newest ``keep``.

    Raises:
        RunFailed: when the disk is full; nothing is left behind and older checkpoints are untouched.
    """
    final, new = root / f"step-{step:06d}", root / f".new-{step:06d}-{os.getpid()}"
    if final.exists() and verify(final) is None:
        return final
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    new.mkdir(parents=True)
    with _cleanup(root, new, needed):
        for name, group in tensors.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in group.items()}, new / f"{name}.safetensors")
        (new / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
        files = sorted(new.iterdir())
        for file in files:
            file.chmod(0o666 & ~umask())  # safetensors writes 0600, which other users of a group cannot read
            flush(file)
        listed = {f.name: {"bytes": f.stat().st_size, "sha256": _checksum(f)} for f in files}
        manifest = new / MANIFEST
        manifest.write_text(json.dumps({"step": step, "files": listed}, indent=1), encoding="utf-8")
        flush(manifest)
        flush(new)
        if final.exists():
            shutil.rmtree(final)  # it did not verify
        new.rename(final)
        flush(root)
    for old in [c for c in found(root) if step_of(c) <= step][:-keep]:
        dead = old.with_name(f".old-{old.name}")
        old.rename(dead)
        shutil.rmtree(dead)
    return final


@contextmanager
def _cleanup(root: Path, new: Path, needed: int) -> Iterator[None]:
    """Remove ``new`` on any failure; on a write error report the space needed and free."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            free = shutil.disk_usage(root).free
            raise RunFailed(
                f"{root}: cannot write a checkpoint of {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free "
                f"({error}); make room, then give the same command again"
            ) from error
        raise


def require_room(root: Path, size: int, keep: int) -> None:
    """Refuse to start a run whose checkpoints (``keep`` of ``size`` bytes, and one being written) do not fit.

    Raises:
        UserError: with the megabytes needed and free.
    """
    needed, free = (keep + 1 - min(keep, len(found(root)))) * size, shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"--output-dir {root.parent}: its checkpoints need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
            "make room or name a folder on another disk"
        )


def found(root: Path) -> list[Path]:
    """The checkpoints that sdtune wrote, by step. A renamed or copied one is not among them."""
    return sorted((c for c in root.glob("step-*") if NAME.fullmatch(c.name) and c.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def verify(folder: Path) -> str | None:
    """``None`` for a complete checkpoint, else what is wrong with it."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not written completely"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is damaged"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
        if _checksum(path) != expected["sha256"]:
            return f"{name} does not match its checksum"
    return None


def sweep(root: Path) -> None:
    """Remove what an interrupted save or removal left."""
    for stale in root.glob(".*"):
        if UNFINISHED.fullmatch(stale.name):
            shutil.rmtree(stale, ignore_errors=True)


def latest(root: Path, log: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint; ``None`` when there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and none is complete. A run never starts anew unless it is told to.
    """
    reasons: list[str] = []
    for folder in reversed(found(root)):
        reason = verify(folder)
        if reason is None:
            for line in reasons:
                log(f"skipped a damaged checkpoint: {line}")
            return folder
        reasons.append(f"{folder}: {reason}")
    if reasons:
        raise UserError("every checkpoint is damaged; --overwrite starts anew\n       " + "\n       ".join(reasons))
    return None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the state, as ``save`` was given them."""
    tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))
