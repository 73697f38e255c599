"""Where sdtune keeps what it can compute again, and when a file counts as changed."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Where sdtune keeps what it can compute again: $SDTUNE_CACHE, else ~/.cache/sdtune."""
    return Path(os.environ.get("SDTUNE_CACHE") or "~/.cache/sdtune").expanduser()


def local_stamp(path: Path) -> str:
    """Changes when the file does. A copy may bring its modification time along, hence the change time too."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
