"""Inspects every image of a dataset once and remembers the result for later runs.

Decoding an image of 1024 x 1024 takes 7 ms (JPEG) to 45 ms (PNG), so a folder that has not changed is not read
again, and each process of a run inspects a share. Results are remembered in one JSON file per dataset. It is replaced
atomically, so two runs may write it at the same time; if it cannot be read, all images are inspected again.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import Progress
from torch import distributed

from sdtune.data.cache_folder import cache_root, remember
from sdtune.data.images import ImageInfo, inspect_image
from sdtune.run.barrier import apart, store_barrier

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
    found = {key: memo[key] for key in keys if key in memo}
    missing = [index for index, key in enumerate(keys) if key not in found]
    together = distributed.is_initialized() and not apart.is_set()
    if together:
        share = missing[distributed.get_rank() :: distributed.get_world_size()]
        own = dict(zip([keys[index] for index in share], _inspect_all(share, read), strict=True))
        store_barrier()  # it is patient where one share takes long; a collective would give up
        for of_one in gather_object([own]):
            found |= of_one
    # Together none are left, unless processes remember different images, or see other dates of the same files.
    left = [index for index in missing if keys[index] not in found]
    found |= zip([keys[index] for index in left], _inspect_all(left, read), strict=True)
    if missing:
        # Only good images: a bad one may be readable next time, and there are few. Other remembered results stay,
        # since another run may use another part of the dataset.
        good = {key: info[:-1] for key, info in (memo | found).items() if not info.problem}
        remember(results_file, {"version": _VERSION, "probes": good})
    return [found[key] for key in keys]


def _inspect_all(indices: list[int], read: Callable[[int], Path | bytes]) -> list[ImageInfo]:
    """Inspect ``read(i)`` for each of ``indices``; the first process shows how far it is."""

    def inspect(index: int) -> ImageInfo:
        try:
            return inspect_image(read(index))
        except ValueError as error:
            return ImageInfo(0, 0, "", problem=str(error))

    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("Reading images", total=len(indices))
    seen = progress.console.is_terminal and not (distributed.is_initialized() and distributed.get_rank())
    start = time.monotonic()
    found = []
    # Pillow warns of files that decoding will judge anyway. The filter is set here, not in the threads, where
    # setting it would be a race.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        try:
            for info in pool.map(inspect, indices):
                found.append(info)
                progress.advance(task)
                if seen and time.monotonic() - start > _PATIENCE:
                    progress.start()  # no effect if it has started
        finally:
            progress.live.stop()  # Progress.stop() would print an empty line even if it never ran
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return found


def _load_results(results_file: Path) -> dict[str, ImageInfo]:
    try:
        memo = json.loads(results_file.read_bytes())
        if memo["version"] != _VERSION:
            return {}
        return {
            key: ImageInfo(int(w), int(h), str(sha), str(mode), int(frames), bool(dim), bool(blank))
            for key, (w, h, sha, mode, frames, dim, blank) in memo["probes"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
