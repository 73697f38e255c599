"""Data sets in shards, too large to look at image by image: what is in each shard is looked up once and kept.

A shard is a tar file of webdataset's convention (``tars``) or a row group of a parquet file (``row_groups``). What a
run holds in memory is a few numbers for each shard; where the images of a shard lie is in a file of the cache, mapped
into memory while a window of the run lies in that shard. Images and captions are read from there, by byte range.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.progress import track

from sdtune.config.sections import UserError
from sdtune.data.files import remote, stamp_of
from sdtune.data.metadata import problem_list
from sdtune.data.probes import cache_root
from sdtune.data.sources import Row
from sdtune.run.processes import store_barrier

_VERSION = 1
READERS = 16
"""Shards that are looked up at the same time where they are far away, which is waiting for the most part."""


class Record(NamedTuple):
    """One image as it lies in a shard."""

    name: str
    captions: tuple[str, ...]
    content: bytes | None
    """The file; none where it was encoded already."""


class Index(NamedTuple):
    """What is known of a shard; the rest is in ``file``."""

    file: Path
    count: int
    """Images."""
    left_out: int
    """Samples that lack an image or a caption."""
    content: str
    """Hash of what the shard says of itself: names, places and sizes of what it holds."""


class Shards:
    """A data set in shards. A subclass says how one is opened.

    Attributes:
        names: of each shard, for messages.
        counts: images of each shard, int64.
        contents: a hash of each shard's table of contents; with the names they make the fingerprint.
        notes: what a person should know, a line each.
        column, caption: where captions are, or the one of all images; neither where none is read.
    """

    rows: tuple[Row, ...] = ()
    """Nothing is known of single images before they are read."""
    classes: tuple[str, ...] = ()

    def __init__(
        self,
        names: list[str],
        counts: Iterable[int],
        contents: list[str],
        notes: list[str],
        column: str | None,
        caption: tuple[str, ...],
    ):
        self.names, self.contents, self.notes, self.column, self.caption = names, contents, notes, column, caption
        self.counts = np.fromiter(counts, np.int64, len(names))
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        listed = hashlib.sha256()
        for name, content in zip(names, contents, strict=True):
            listed.update(f"{name}\0{content}\0".encode())
        self.fingerprint = listed.hexdigest()
        self._opened: dict[int, dict[int, Any]] = {}
        self._process = os.getpid()

    @property
    def sizes(self) -> list[int]:
        """Images of each part of the data set, of which there is one."""
        return [len(self)]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def open(self, shard: int) -> Any:
        """What gives the ``Record`` of the n-th image of a shard by ``record(n)``, closed when it is forgotten."""
        raise NotImplementedError

    def place(self, index: int) -> tuple[int, int]:
        """Shard, and number in it, of the image that is ``index``-th in the order of the names of the shards."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def opened(self, shard: int, lane: int = -1, live: frozenset[int] = frozenset()) -> Any:
        """The opened shard; a lane keeps those in which its window lies, and closes the others.

        Without a lane it is one that any lane has opened, else it is kept until another is asked for.
        """
        if self._process != os.getpid():  # a loader's worker: connections do not survive a fork
            self._opened, self._process = {}, os.getpid()
        if lane == -1:
            lane = next((lane for lane, held in self._opened.items() if shard in held), -1)
        mine = self._opened.setdefault(lane, {})
        if shard not in mine:
            for old in mine.keys() - live:
                del mine[old]
            mine[shard] = self.open(shard)
        return mine[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # an open file does not travel to a loader's worker


# ---- looking up what is in each shard


def look_up(urls: list[str], how: str, build: Callable[[str], tuple[np.ndarray, int, str]]) -> list[Index]:
    """What is in each shard, from the cache or by ``build``; each process looks up its share.

    Args:
        how: what ``build`` looks for; another ``how`` is another index.
        build: table to keep, samples left out and content of a shard. Raises ValueError or OSError that says what is
            wrong with it.

    Raises:
        UserError: names all shards that are damaged or gone.
    """
    state, folder = PartialState(), cache_root() / "shards"
    stamps, problems = _stamps(urls)
    keys = [
        hashlib.sha256(repr((_VERSION, how, *pair)).encode()).hexdigest()[:24]
        for pair in zip(urls, stamps, strict=True)
    ]
    where = dict(zip(keys, urls, strict=True))

    def make(key: str) -> str | None:
        try:
            table, left_out, content = build(where[key])
        except (ValueError, OSError) as error:
            return f"{where[key]}: {error}"
        new = folder / f".{key}-{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                np.save(file, table)
            new.replace(folder / f"{key}-{len(table)}-{left_out}-{content}.npy")
        except OSError as error:
            way_out = "make room, or set SDTUNE_CACHE to a folder on another disk"
            raise UserError(f"{folder}: what is in the shards cannot be kept ({error}); {way_out}") from None
        return None

    with ThreadPoolExecutor(READERS if any(map(remote, urls)) else 1) as pool:
        # What is wrong in one process's share is found again by all below, so that all of them stop.
        there, known = [key for key, when in zip(keys, stamps, strict=True) if when], _kept(folder)
        todo = [key for key in there[state.process_index :: state.num_processes] if key not in known]
        quiet = not state.is_main_process or len(todo) < 64
        found = pool.map(make, todo)
        problems += [p for p in track(found, "Reading shards", total=len(todo), disable=quiet, transient=True) if p]
        store_barrier()
        known = _kept(folder)
        again = [key for key in there if key not in known and key not in todo]
        problems += [problem for problem in pool.map(make, again) if problem]
    if problems:
        raise problem_list(
            f"{len(problems)} of {len(urls)} shards cannot be used; mend them, or leave them out", sorted(problems)
        )
    known = _kept(folder)
    return [known[key] for key in keys]


def _kept(folder: Path) -> dict[str, Index]:
    """All that is known of shards, by key, from one listing of the folder: there may be 100,000 of them."""
    found = {}
    for file in folder.glob("[!.]*.npy"):
        key, count, left_out, content = file.stem.split("-")
        found[key] = Index(file, int(count), int(left_out), content)
    return found


def _stamps(urls: list[str]) -> tuple[list[str], list[str]]:
    """What changes when a shard does, of each, empty for those that are not there; and what is wrong with these.

    Only the first process asks for shards that are far away.
    """
    state = PartialState()

    def ask(url: str) -> tuple[str, str]:
        try:
            return stamp_of(url), ""
        except FileNotFoundError:
            return "", f"{url}: no such file"
        except OSError as error:
            return "", f"{url}: cannot be read ({error.strerror or error})"
        except UserError:
            raise
        except Exception as error:  # each file system raises kinds of its own
            return "", f"{url}: cannot be read ({str(error) or type(error).__name__})"

    asked = [ask(url) for url in urls if not remote(url)]
    if far := [url for url in urls if remote(url)]:
        if state.is_main_process:
            with ThreadPoolExecutor(READERS) as pool:
                asked += pool.map(ask, far)
        store_barrier()
        if state.num_processes > 1:
            (asked,) = broadcast_object_list([asked])
    return [when for when, _ in asked], [problem for _, problem in asked if problem]
