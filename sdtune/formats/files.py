"""Reading and writing by format."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdtune.formats.neutral import AdapterFile


def read(path: Path) -> AdapterFile:
    """An adapter file or folder of any known format.

    Raises:
        UserError: a pickle, no safetensors file, a format that its keys do not tell, or a half of one.
    """
    raise NotImplementedError


def write(path: Path, adapter: AdapterFile, to: str) -> None:
    """Write ``adapter`` to ``path`` (a file; for ``peft`` a folder). The same content gives the same bytes.

    Args:
        to: ``diffusers``, ``peft``, ``kohya`` or ``comfyui``.

    Raises:
        UserError: the format cannot hold this kind of adapter.
    """
    raise NotImplementedError


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A hidden name beside ``path`` to write to, which becomes ``path`` when the block ends well, and nothing else."""
    new = path.with_name(f".{path.name}")
    try:
        yield new
        new.replace(path)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink(missing_ok=True)
