"""Files that are written completely or not at all, with the permissions that the umask asks for."""

import glob
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

HALF_WRITTEN = re.compile(
    r"\.(config|launch)-\d+\.yaml"  # of a run's folder
    r"|(metrics\.jsonl|report\.html|step-\d+\.png)\.partial"
    r"|[0-9a-f]{24}\.\d+\.tmp|\.[0-9a-f]{24}-\d+\.tmp"  # of the cache
    r"|\.tmp[A-Za-z0-9]{6}|tmp[a-z0-9_]{8}\.tmp"  # of safetensors, of Python's tempfile
)
"""Names of files that a killed process may leave behind."""
WRITING = 60.0
"""Seconds since its last change for which a file may still be in use by the process that writes it."""
FILLING = 3600.0
"""The same for a folder, whose own time does not change while a large file in it grows."""


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under another name and rename it.

    Raises:
        OSError, SafetensorError: it cannot be written; nothing is left behind.
    """
    new = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), new, metadata)
        new.chmod(0o666 & ~umask())  # safetensors writes 0600, which other users of a group cannot read
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sweep_folders(new: Path) -> None:
    """Remove the folders that killed processes left in the place of ``new``, whose name ends in the process number."""
    name, _, _ = new.name.rpartition("-")
    for folder in new.parent.glob(f"{glob.escape(name)}-*"):
        try:
            if folder.name.removeprefix(f"{name}-").isdigit() and time.time() - folder.stat().st_mtime > FILLING:
                shutil.rmtree(folder)
        except OSError:
            continue


def sweep(folder: Path) -> None:
    """Remove the half-written files that killed processes left directly in ``folder``."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if HALF_WRITTEN.fullmatch(file.name):
            try:
                if time.time() - file.stat().st_mtime > WRITING:
                    file.unlink()
            except OSError:  # another process has finished or removed it, or it belongs to another user
                continue
