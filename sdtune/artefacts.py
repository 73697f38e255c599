"""Artefacts of several files at the root of a run's folder, written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sdtune.configs import RunFailed


def write_whole(out: Path, fill: Callable[[Path], None], last: str) -> list[Path]:
    """Let ``fill`` write into a folder of its own, then move what is in it to ``out``; the files, sorted.

    An older artefact stays as it is until the new one is complete. While the parts change places, ``out`` has no
    ``last``, the file without which no reader takes it for an artefact.

    Raises:
        RunFailed: the disk is full; nothing new is left behind.
    """
    new = out / f".artefact-{os.getpid()}"
    try:
        new.mkdir(parents=True)
        fill(new)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{out}: the artefact cannot be written ({error}); make room, then give the same command again"
        ) from error
    else:
        files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
        (out / last).unlink(missing_ok=True)
        for part in sorted(new.iterdir(), key=lambda path: (path.name == last, path.name)):
            old = out / part.name
            if old.is_dir():
                shutil.rmtree(old)
            part.replace(old)
        return [out / file for file in files]
    finally:
        shutil.rmtree(new, ignore_errors=True)
