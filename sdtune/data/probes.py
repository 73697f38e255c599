"""Every image of a dataset looked at once, and the findings kept between runs.

A full decode costs 7 ms (JPEG) to 45 ms (PNG) at 1024 x 1024, so a folder that has not changed is not read
twice. The memo is one JSON file per dataset; it is replaced atomically, so two runs at once are safe, and a
memo that cannot be read is made anew.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from sdtune.data.images import Probe, probe

_VERSION = 2
_PATIENCE = 1.0  # seconds before a progress bar is worth its lines


def cache_root() -> Path:
    """Where sdtune keeps what it can compute again: $SDTUNE_CACHE, else ~/.cache/sdtune."""
    return Path(os.environ.get("SDTUNE_CACHE") or "~/.cache/sdtune").expanduser()


def stamp(path: Path) -> str:
    """Changes when the file does. A copy may bring its modification time along, hence the change time too."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def probe_all(dataset: str, keys: list[str], read: Callable[[int], Path | bytes]) -> list[Probe]:
    """Probe ``read(i)`` for every key, or take what the memo of ``dataset`` knows under ``keys[i]``.

    Args:
        dataset: names the memo, e.g. the folder's absolute path.
        keys: one per image; must change when the image does.
    """
    memo_file = cache_root() / "probes" / f"{hashlib.sha256(dataset.encode(errors='replace')).hexdigest()[:32]}.json"
    memo = _load(memo_file)
    found = {key: Probe(*memo[key]) for key in keys if key in memo}
    missing = [index for index, key in enumerate(keys) if key not in found]

    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("Reading images", total=len(missing))
    start = time.monotonic()
    # Pillow's warnings are about files that the full decode judges; the filter is set here, once, because
    # setting it in the threads would race.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        try:
            for index, result in zip(missing, pool.map(lambda i: probe(read(i)), missing), strict=True):
                found[keys[index]] = result
                progress.advance(task)
                if progress.console.is_terminal and time.monotonic() - start > _PATIENCE:
                    progress.start()  # does nothing when it runs
        finally:
            progress.live.stop()  # Progress.stop() would print an empty line even if it never ran
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    if missing:
        # Good images only: a bad one may have had a bad moment, and there are few. What else the memo knows
        # stays: another run may use another part of the dataset.
        good = {key: (p.width, p.height, p.sha256, p.mode) for key, p in found.items() if not p.problem}
        _store(memo_file, memo | good)
    return [found[key] for key in keys]


def _load(memo_file: Path) -> dict[str, tuple[int, int, str, str]]:
    try:
        memo = json.loads(memo_file.read_bytes())
        if memo["version"] != _VERSION:
            return {}
        return {key: (int(w), int(h), str(sha), str(mode)) for key, (w, h, sha, mode) in memo["probes"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _store(memo_file: Path, memo: dict[str, tuple[int, int, str, str]]) -> None:
    # Nowhere to write only means to look again next time.
    with contextlib.suppress(OSError):
        memo_file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memo_file.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"version": _VERSION, "probes": memo}, file)
            Path(name).replace(memo_file)
        except BaseException:
            Path(name).unlink()
            raise
