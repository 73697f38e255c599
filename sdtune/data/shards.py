"""Datasets in shards, too large to inspect every image before training. Each shard is indexed once.

A shard is a tar file in webdataset's format (``tar_shards``) or a row group of a parquet file (``parquet_shards``). A
run holds a few numbers for each shard in memory. The places of the images in a shard are in an index file of the cache,
which is memory-mapped while a window of the run covers that shard. Images and captions are read by byte range.
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
from sdtune.data.cache_folder import cache_root
from sdtune.data.files import file_stamp, is_remote
from sdtune.data.metadata import listed_error
from sdtune.data.shard_order import IntArray
from sdtune.data.sources import Row
from sdtune.run.barrier import apart, store_barrier
from sdtune.run.files import sweep

_VERSION = 1
READERS = 16
"""Remote shards that are indexed at the same time, since most of that time is spent waiting."""


class Record(NamedTuple):
    """One image of a shard."""

    name: str
    captions: tuple[str, ...]
    content: bytes | None
    """The bytes of the image file; None if only its moments are stored."""
    size: tuple[int, int] | None = None
    """Width and height of the image file, if only its moments are stored."""
    paired: tuple[bytes, ...] = ()
    """The bytes of its paired images, in the order of their columns."""


class ShardIndex(NamedTuple):
    """The index of a shard. The places of the images are in ``file``."""

    file: Path
    images: int
    left_out: int
    """Samples without an image or a caption."""
    content: str
    """Hash of the names, places and sizes of what the shard holds."""


class Shards:
    """A dataset in shards. A subclass implements ``open``.

    Attributes:
        names: the name of each shard, for messages.
        counts: images of each shard, int64.
        contents: a hash of each shard's contents; with the names they make the fingerprint.
        notes: lines to tell the user.
        column, caption: the column of the captions, or one caption for all images; both empty if none is read.
    """

    rows: tuple[Row, ...] = ()
    """Empty: nothing is known of single images before they are read."""
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

    subjects = 1
    """See ``Mixture``."""

    @property
    def sizes(self) -> list[int]:
        """Images of each part of the dataset. There is one part."""
        return [len(self)]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def open(self, shard: int) -> Any:
        """Open a shard: its ``record(n)`` gives the ``Record`` of image n. It closes when nothing refers to it."""
        raise NotImplementedError

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of image ``index``, and its number in that shard. Shards are in the order of ``names``."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def get_open(self, shard: int, lane: int = -1, live: frozenset[int] = frozenset()) -> Any:
        """The opened shard. A lane holds the shards ``live`` of its window open, and closes the others.

        Without a lane, a shard that any lane has opened is used; else it stays open until another one is needed.
        """
        if self._process != os.getpid():  # a worker of the loader: connections do not survive a fork
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
        return self.__dict__ | {"_opened": {}}  # an open file cannot be sent to a worker of the loader


# ---- the index of each shard


def index_shards(urls: list[str], how: str, build: Callable[[str], tuple[IntArray, int, str]]) -> list[ShardIndex]:
    """The index of each shard, from the cache or made by ``build``. Each process makes a share of the missing ones.

    Args:
        how: the settings of ``build``; with other settings the index is another one.
        build: gives the table of places, the number of samples left out, and the hash of the contents of a shard.
            Raises ValueError or OSError for a shard that cannot be used.

    Raises:
        UserError: names all shards that are damaged or missing.
    """
    state, folder = PartialState(), cache_root() / "shards"
    if state.is_main_process:
        sweep(folder)
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
            raise UserError(f"{folder}: the index of the shards cannot be written ({error}); {way_out}") from None
        return None

    with ThreadPoolExecutor(READERS if any(map(is_remote, urls)) else 1) as pool:
        # Below, all processes repeat the shards in which one of them found a fault, so that all of them stop.
        present = [key for key, when in zip(keys, stamps, strict=True) if when]
        known = _known_indexes(folder)
        todo = [key for key in present[state.process_index :: state.num_processes] if key not in known]
        quiet = not state.is_main_process or len(todo) < 64
        found = pool.map(make, todo)
        problems += [p for p in track(found, "Reading shards", total=len(todo), disable=quiet, transient=True) if p]
        store_barrier()
        known = _known_indexes(folder)
        failed = [key for key in present if key not in known and key not in todo]
        problems += [problem for problem in pool.map(make, failed) if problem]
    if problems:
        raise listed_error(
            f"{len(problems)} of {len(urls)} shards cannot be used; repair them, or leave them out", sorted(problems)
        )
    known = _known_indexes(folder)
    return [known[key] for key in keys]


def _known_indexes(folder: Path) -> dict[str, ShardIndex]:
    """All indexes in the folder by key, from one listing, since there may be 100,000."""
    found = {}
    for file in folder.glob("[!.]*.npy"):
        key, count, left_out, content = file.stem.split("-")
        found[key] = ShardIndex(file, int(count), int(left_out), content)
    return found


def _stamps(urls: list[str]) -> tuple[list[str], list[str]]:
    """For each shard a text that changes when it changes, empty if it is missing; and a line for each missing shard.

    Only the first process asks for remote shards.
    """
    state = PartialState()

    def ask(url: str) -> tuple[str, str]:
        try:
            return file_stamp(url), ""
        except FileNotFoundError:
            return "", f"{url}: no such file"
        except OSError as error:
            return "", f"{url}: cannot be read ({error.strerror or error})"
        except UserError:
            raise
        except Exception as error:  # each file system raises other errors
            return "", f"{url}: cannot be read ({str(error) or type(error).__name__})"

    asked = [ask(url) for url in urls if not is_remote(url)]
    if remote := [url for url in urls if is_remote(url)]:
        alone = state.num_processes == 1 or apart.is_set()
        if state.is_main_process or alone:
            with ThreadPoolExecutor(READERS) as pool:
                asked += pool.map(ask, remote)
        store_barrier()
        if not alone:
            (asked,) = broadcast_object_list([asked])
    return [when for when, _ in asked], [problem for _, problem in asked if problem]
