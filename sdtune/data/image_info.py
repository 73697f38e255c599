"""Inspects every image of a dataset once and remembers the result for later runs.

Decoding an image of 1024 x 1024 takes 7 ms (JPEG) to 45 ms (PNG), so a folder that has not changed is not read
again. Results are remembered in one JSON file per dataset. It is replaced atomically, so two runs may write it at the
same time; if it cannot be read, all images are inspected again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from sdtune.data.cache_folder import cache_root
from sdtune.data.images import ImageInfo, inspect_image
from sdtune.run.files import sweep, umask

_VERSION = 3
_PATIENCE = 1.0  # seconds before a progress bar is worth its lines


def inspect_images(dataset: str, keys: list[str], read: Callable[[int], Path | bytes]) -> list[ImageInfo]:
    """Inspect ``read(i)`` for every key, or take the remembered result of ``keys[i]``.

    Args:
        dataset: names the file of results, e.g. the absolute path of the folder.
        keys: one per image; a key must change when its image changes.
        read: gives the file or the bytes of an image, or raises a ValueError that says why it cannot.
    """
    results_file = cache_root() / "probes" / f"{hashlib.sha256(dataset.encode(errors='replace')).hexdigest()[:32]}.json"
    memo = _load_results(results_file)
    found = {key: ImageInfo(*memo[key]) for key in keys if key in memo}
    missing = [index for index, key in enumerate(keys) if key not in found]

    def inspect(index: int) -> ImageInfo:
        try:
            return inspect_image(read(index))
        except ValueError as error:
            return ImageInfo(0, 0, "", problem=str(error))

    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("Reading images", total=len(missing))
    start = time.monotonic()
    # Pillow warns of files that decoding will judge anyway. The filter is set here, not in the threads, where
    # setting it would be a race.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        try:
            for index, result in zip(missing, pool.map(inspect, missing), strict=True):
                found[keys[index]] = result
                progress.advance(task)
                if progress.console.is_terminal and time.monotonic() - start > _PATIENCE:
                    progress.start()  # no effect if it has started
        finally:
            progress.live.stop()  # Progress.stop() would print an empty line even if it never ran
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    if missing:
        # Only good images: a bad one may be readable next time, and there are few. Other remembered results stay,
        # since another run may use another part of the dataset.
        good = {key: dataclasses.astuple(info)[:-1] for key, info in found.items() if not info.problem}
        _store_results(results_file, memo | good)
    return [found[key] for key in keys]


def _load_results(results_file: Path) -> dict[str, tuple[Any, ...]]:
    try:
        memo = json.loads(results_file.read_bytes())
        if memo["version"] != _VERSION:
            return {}
        return {
            key: (int(w), int(h), str(sha), str(mode), int(frames), bool(dim), bool(blank))
            for key, (w, h, sha, mode, frames, dim, blank) in memo["probes"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _store_results(results_file: Path, memo: dict[str, tuple[Any, ...]]) -> None:
    # If there is no place to write, images are inspected again next time.
    with contextlib.suppress(OSError):
        results_file.parent.mkdir(parents=True, exist_ok=True)
        sweep(results_file.parent)
        handle, name = tempfile.mkstemp(dir=results_file.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"version": _VERSION, "probes": memo}, file)
            Path(name).chmod(0o666 & ~umask())  # a cache may be shared, and mkstemp makes it 0600
            Path(name).replace(results_file)
        except BaseException:
            Path(name).unlink()
            raise
