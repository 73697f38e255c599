"""Tar files of webdataset's convention: the members of a sample follow one another, under one name but for the ending.

    000017.jpg 000017.txt 000018.jpg 000018.txt ...

A tar has no table of contents, so the headers of each are walked once. Kept are 32 bytes for each image: where it and
its caption lie. The header in front of an image gives its name when it is read, and tells a file that was changed.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sdtune.config.sections import UserError
from sdtune.data.files import opened, patiently, remote, system_of
from sdtune.data.images import EXTENSIONS
from sdtune.data.metadata import parse_captions
from sdtune.data.shards import Record, Shards, look_up

BLOCK = tarfile.BLOCKSIZE
IMAGE = "image"
"""``--image-column`` when it is not given: a member of any accepted extension."""


def open_tars(cfg: Any, urls: list[str], captions: bool) -> "Tars":
    """The shards at ``urls``, all of them looked into.

    Args:
        captions: whether every image needs one; else none is read.
    """
    column = (cfg.caption_column or "txt") if captions and cfg.caption is None else None
    strict = cfg.on_bad_image == "error"
    how = repr((cfg.image_column, column, strict))
    found = look_up(urls, how, lambda url: contents(url, cfg.image_column, column, strict))
    left_out = sum(index.left_out for index in found)
    notes = [f"samples without an image or a caption, left out: {left_out}"] if left_out else []
    if empty := sum(index.count == 0 for index in found):
        notes.append(f"empty shards: {empty}")
    caption = (cfg.caption,) if captions and cfg.caption is not None else ()
    return Tars(
        urls,
        [index.file for index in found],
        [i.count for i in found],
        [i.content for i in found],
        notes,
        column,
        caption,
    )


class Tars(Shards):
    """Args: urls, index files, images and contents of the shards; column of the caption, or one caption for all."""

    def __init__(
        self,
        urls: list[str],
        files: list[Path],
        counts: list[int],
        contents: list[str],
        notes: list[str],
        column: str | None,
        caption: tuple[str, ...],
    ):
        super().__init__([url.rpartition("/")[2] for url in urls], counts, contents, notes, column, caption)
        self.urls, self.files = urls, files

    def open(self, shard: int) -> "Tar":
        return Tar(self, shard)


class Tar:
    """One tar file, opened."""

    def __init__(self, shards: Tars, shard: int):
        self.closing = ExitStack()
        self.url, self.name, self.shards = shards.urls[shard], shards.names[shard], shards
        self.table = np.load(shards.files[shard], mmap_mode="r")
        if remote(self.url):
            self.system, self.path = system_of(self.url)
        else:
            try:
                self.file = os.open(self.url, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{self.url} was there when training began, but not now: {error.strerror}") from None
            self.closing.callback(os.close, self.file)

    def __del__(self) -> None:
        self.closing.close()

    def record(self, nth: int) -> Record:
        """Raises: ValueError that says what is wrong with the caption."""
        at, size, text_at, text_size = self.table[nth].tolist()
        first = (min(at, text_at) if text_size else at) - BLOCK
        last = max(at + size, text_at + text_size)
        data = self._bytes(first, last)  # members of a sample are neighbours: one read
        member = self._member(data, at - first, size)
        if not self.shards.column:
            captions = self.shards.caption
        else:
            kind = self._member(data, text_at - first, text_size).rpartition(".")[2]
            captions = _captions(data[text_at - first :][:text_size], kind, self.shards.column)
        return Record(f"{self.name}/{member}", captions, data[at - first :][:size])

    def _bytes(self, first: int, last: int) -> bytes:
        if remote(self.url):
            return patiently(self.url, lambda: self.system.cat_file(self.path, start=first, end=last))
        return os.pread(self.file, last - first, first)

    def _member(self, data: bytes, at: int, size: int) -> str:
        """The name in the header in front of ``at``."""
        try:
            header = tarfile.TarInfo.frombuf(data[at - BLOCK : at], "utf-8", "surrogateescape")
            if header.size == size and len(data) >= at + size:
                return header.name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        except tarfile.HeaderError:
            pass
        raise UserError(f"{self.url} changed since this command looked into it; give the command again")


def _captions(data: bytes, kind: str, column: str) -> tuple[str, ...]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("its caption is not UTF-8 text") from None
    if kind != "json" or column == "json":
        return parse_captions(" ".join(text.split()))
    try:
        cells = json.loads(text)
    except ValueError:
        cells = None
    if not isinstance(cells, dict):
        raise ValueError("its .json member is no JSON object")
    return parse_captions(cells.get(column))


# ---- what is in a tar


def contents(url: str, image: str, column: str | None, strict: bool) -> tuple[np.ndarray, int, str]:
    """Offset and size of each image and its caption, int64 ``[images, 4]``; samples without either; a hash.

    Raises:
        ValueError: it is damaged; or, if ``strict``, there is a sample without image or caption, or no sample.
    """
    rows, lacking, seen, said = [], [], [], hashlib.sha256()
    samples = 0
    for key, group in groupby(_members(url), lambda member: _split(member.name)[0]):
        samples += 1
        members = {}
        for member in group:
            said.update(
                f"{member.name}\0{member.offset_data}\0{member.size}\0{member.chksum}\0".encode(errors="replace")
            )
            members[_split(member.name)[1]] = member
        pictures = [kind for kind in members if (f".{kind}" in EXTENSIONS if image == IMAGE else kind == image)]
        text = members.get(column or "", members.get("json")) if column else None
        if len(pictures) > 1:
            raise ValueError(
                f"sample {key} has images {' and '.join(pictures)}; say with --image-column which to train on"
            )
        if not pictures or not members[pictures[0]].size or (column and (text is None or not text.size)):
            lacking.append(key)
            seen = seen or sorted(members)
            continue
        picture = members[pictures[0]]
        rows.append((picture.offset_data, picture.size, text.offset_data if text else 0, text.size if text else 0))
    if strict and not samples:
        raise ValueError("an empty shard; remove it, or pass over it with --on-bad-image skip")
    if lacking and (strict or not rows):
        parts = "an image" + (
            f" and a caption (.{column}, or {column!r} in .json; --caption-column names another)" if column else ""
        )
        raise ValueError(
            f"{len(lacking)} of {samples} samples are without {parts}, or not beside it: {lacking[0]} has "
            f"{', '.join(seen)}; or leave them out with --on-bad-image skip"
        )
    return np.array(rows, np.int64).reshape(-1, 4), len(lacking), said.hexdigest()[:16]


def _split(name: str) -> tuple[str, str]:
    """``a/b.seg.png`` as ``a/b`` and ``seg.png``."""
    folder, _, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, kind.lower()


def _members(url: str) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, without what is hidden. Raises: ValueError if it is damaged or cut short."""
    with ExitStack() as closing:
        file = closing.enter_context(opened(url))
        try:
            tar = closing.enter_context(tarfile.open(fileobj=file, mode="r:"))
            while member := tar.next():
                tar.members = []  # tarfile keeps every one
                last = member.name.rpartition("/")[2]
                if member.isfile() and not last.startswith((".", "__")) and "." in last:
                    yield member
            end = tar.offset  # tarfile takes a damaged header for the end, and says nothing
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise ValueError(f"damaged or cut short at byte {end}; copy it again")
        except (tarfile.TarError, EOFError) as error:
            hint = "; a compressed tar has to be unpacked" if url.endswith(("gz", "bz2", "xz", "zst")) else ""
            raise ValueError(f"not a whole tar file ({error}){hint}; copy it again") from None
