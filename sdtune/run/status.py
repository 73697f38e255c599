"""``status.json``: how far a run is and how it ended, for its report and for `sdtune watch`."""

import fcntl
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

State = Literal["running", "finished", "interrupted", "failed", "killed"]

FILE = "status.json"


class Status(NamedTuple):
    state: State
    step: int
    """Optimizer steps done."""
    total: int
    """Optimizer steps at the end of the run."""
    written: float
    """When this was written, in seconds since 1970."""
    seconds_left: float | None = None
    """Time until the last step at the speed so far, with samples and checkpoints; None where nothing is known yet."""
    message: str = ""
    """Why the run failed, in one line."""


def write(folder: Path, status: Status) -> None:
    """Write ``status.json`` into a run's folder, complete or not at all."""
    new = folder / f".{FILE}"
    new.write_text(json.dumps(status._asdict()) + "\n", encoding="utf-8")
    new.replace(folder / FILE)


def read(folder: Path) -> Status | None:
    """The status that a run wrote last; None where there is none, or a damaged one.

    A process that is killed cannot write how it ended: a run that is said to be running, but whose folder no process
    holds, was killed. On a file system that several machines share, its locks must be shared too.
    """
    try:
        found: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        status = Status(**found)
        if status.state not in get_args(State):
            return None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return status._replace(state="killed") if status.state == "running" and not locked(folder) else status


def locked(folder: Path) -> bool:
    """Whether a process trains in this folder."""
    try:
        with (folder / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it belongs to another user, who may not share it
        return False
    return False
