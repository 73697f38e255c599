"""Where sdtune keeps what it can compute again, and when a file counts as changed."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import distributed

from sdtune.run.files import sweep, umask


def cache_root() -> Path:
    """Where sdtune keeps what it can compute again: $SDTUNE_CACHE, else ~/.cache/sdtune."""
    return Path(os.environ.get("SDTUNE_CACHE") or "~/.cache/sdtune").expanduser()


def remember(file: Path, content: Any) -> None:
    """Write what all processes of a run know to a JSON file of the cache, once on each machine.

    It is complete or not there. If there is no place to write, it is computed again next time.
    """
    if distributed.is_initialized() and not PartialState().is_local_main_process:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        sweep(file.parent)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as new:
                json.dump(content, new)
            Path(name).chmod(0o666 & ~umask())  # a cache may be shared, and mkstemp makes it 0600
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink()
            raise


def local_stamp(path: Path) -> str:
    """Changes when the file does. A copy may bring its modification time along, hence the change time too."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
