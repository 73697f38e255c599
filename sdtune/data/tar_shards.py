"""Tar files in webdataset's format: the members of a sample follow one another and differ only in their endings.

    000017.jpg 000017.txt 000018.jpg 000018.txt ...

A tar file has no table of contents, so all its headers are read once. The index holds 32 bytes for each image: the
places of the image and its caption. When an image is read, the header in front of it gives its name and shows whether
the file has changed.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import numpy as np

from sdtune.config.sections import Captions, Data, UserError
from sdtune.data.files import file_system, is_remote, name_of, open_file, read_with_retries
from sdtune.data.images import EXTENSIONS
from sdtune.data.metadata import MAX_CAPTION_FILE, parse_caption_text, parse_captions
from sdtune.data.shard_order import IntArray
from sdtune.data.shards import Record, Shards, index_shards

BLOCK = tarfile.BLOCKSIZE
IMAGE = "image"
"""The default of ``--image-column``: a member with any accepted ending."""


def open_tar_shards(cfg: Data, urls: list[str], captions: Captions | None, paired: Sequence[str] = ()) -> "TarShards":
    """Index the tar files at ``urls``.

    Args:
        captions: whether every image needs a caption; else none is read.
        paired: columns of the paired images that every image needs.
    """
    per_line = captions is not None and captions.caption_per_line
    column = (captions.caption_column or "txt") if captions and captions.caption is None else None
    strict = cfg.on_bad_image == "error"
    how = repr((cfg.image_column, column, strict, *paired))
    found = index_shards(urls, how, lambda url: index_tar(url, cfg.image_column, column, strict, paired))
    left_out = sum(index.left_out for index in found)
    notes = [f"samples without an image or a caption, left out: {left_out}"] if left_out else []
    if empty := sum(index.images == 0 for index in found):
        notes.append(f"empty shards: {empty}")
    caption = (captions.caption,) if captions and captions.caption is not None else ()
    return TarShards(
        urls,
        [index.file for index in found],
        [i.images for i in found],
        [i.content for i in found],
        notes,
        column,
        caption,
        per_line,
    )


class TarShards(Shards):
    """Tar files. ``files`` are their index files; for the other arguments see ``Shards``."""

    def __init__(
        self,
        urls: list[str],
        files: list[Path],
        counts: list[int],
        contents: list[str],
        notes: list[str],
        column: str | None,
        caption: tuple[str, ...],
        per_line: bool = False,
    ):
        super().__init__([name_of(url) for url in urls], counts, contents, notes, column, caption)
        self.urls, self.files, self.per_line = urls, files, per_line

    def open(self, shard: int) -> "OpenTar":
        return OpenTar(self, shard)


class OpenTar:
    """An opened tar file."""

    def __init__(self, shards: TarShards, shard: int):
        self.closing = ExitStack()
        self.url, self.name, self.shards = shards.urls[shard], shards.names[shard], shards
        self.table = np.load(shards.files[shard], mmap_mode="r")
        if is_remote(self.url):
            self.system, self.path = file_system(self.url)
        else:
            try:
                self.file = os.open(self.url, os.O_RDONLY)
            except OSError as error:
                raise UserError(
                    f"{self.url} could be read when training began, but not now: {error.strerror}"
                ) from None
            self.closing.callback(os.close, self.file)

    def __del__(self) -> None:
        self.closing.close()

    def record(self, nth: int) -> Record:
        """Raises: ValueError if the caption cannot be used."""
        at, size, text_at, text_size, *others = self.table[nth].tolist()
        pairs = list(zip(others[::2], others[1::2], strict=True))  # places and sizes of the paired images
        if text_size > MAX_CAPTION_FILE:
            raise ValueError(f"its caption has {text_size:,} bytes; at most {MAX_CAPTION_FILE:,} are read")
        first = min([at, *([text_at] if text_size else []), *(place for place, _ in pairs)]) - BLOCK
        last = max(at + size, text_at + text_size, *(place + length for place, length in pairs))
        data = self._bytes(first, last)  # the members of a sample are neighbours, so one read is enough
        member = self._member(data, at - first, size)
        if not self.shards.column:
            captions = self.shards.caption
        else:
            kind = self._member(data, text_at - first, text_size).rpartition(".")[2]
            captions = _captions(data[text_at - first :][:text_size], kind, self.shards.column, self.shards.per_line)
        for place, length in pairs:
            self._member(data, place - first, length)
        paired = tuple(data[place - first :][:length] for place, length in pairs)
        return Record(f"{self.name}/{member}", captions, data[at - first :][:size], paired=paired)

    def _bytes(self, first: int, last: int) -> bytes:
        if is_remote(self.url):
            system, path = self.system, self.path
            data: bytes = read_with_retries(self.url, lambda: system.cat_file(path, start=first, end=last))
            return data
        return os.pread(self.file, last - first, first)

    def _member(self, data: bytes, at: int, size: int) -> str:
        """The name in the header in front of ``at``."""
        try:
            header = tarfile.TarInfo.frombuf(data[at - BLOCK : at], "utf-8", "surrogateescape")
            if header.size == size and len(data) >= at + size:
                return header.name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        except tarfile.HeaderError:
            pass
        raise UserError(f"{self.url} has changed since this command read its headers; start the command again")


def _captions(data: bytes, kind: str, column: str, per_line: bool) -> tuple[str, ...]:
    """The captions in a member. Raises: ValueError that says what is wrong."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("its caption is not UTF-8 text") from None
    if kind != "json" or column == "json":
        return parse_caption_text(text, per_line)
    try:
        cells = json.loads(text)
    except (ValueError, RecursionError):
        cells = None
    if not isinstance(cells, dict):
        raise ValueError("its .json member is not a JSON object")
    return parse_captions(cells.get(column))


# ---- the index of a tar file


def index_tar(
    url: str, image: str, column: str | None, strict: bool, paired: Sequence[str] = ()
) -> tuple[IntArray, int, str]:
    """Offset and size of each image, its caption and its P paired images, int64 ``[images, 4 + 2P]``; how many samples
    lack one of them; a hash.

    Raises:
        ValueError: the file is damaged; or, if ``strict``, a sample has no image or caption, or there is no sample.
    """
    rows: list[tuple[int, ...]] = []
    incomplete: list[str] = []
    members_seen: list[str] = []
    checksum, samples = hashlib.sha256(), 0
    for key, group in groupby(_members(url), lambda member: _split(member.name)[0]):
        samples += 1
        members = {}
        for member in group:
            checksum.update(
                f"{member.name}\0{member.offset_data}\0{member.size}\0{member.chksum}\0".encode(errors="replace")
            )
            members[_split(member.name)[1]] = member
        images = [kind for kind in members if (f".{kind}" in EXTENSIONS if image == IMAGE else kind == image)]
        text = members.get(column or "", members.get("json")) if column else None
        if len(images) > 1:
            raise ValueError(f"sample {key} has images {' and '.join(images)}; choose one with --image-column")
        pairs = [_paired_member(members, name) for name in paired]
        if (
            not images
            or not members[images[0]].size
            or (column and (text is None or not text.size))
            or not all(pair and pair.size for pair in pairs)
        ):
            incomplete.append(key)
            members_seen = members_seen or sorted(members)
            continue
        image_member = members[images[0]]
        caption = (text.offset_data, text.size) if text else (0, 0)
        others = (number for pair in pairs if pair for number in (pair.offset_data, pair.size))
        rows.append((image_member.offset_data, image_member.size, *caption, *others))
    if strict and not samples:
        raise ValueError("an empty shard; remove it, or leave it out with --on-bad-image skip")
    if incomplete and (strict or not rows):
        parts = "image" + (
            f" or caption (.{column}, or {column!r} in .json; --caption-column names another)" if column else ""
        )
        parts += "".join(f" or {name} (such as .{name}.png)" for name in paired)
        raise ValueError(
            f"{len(incomplete)} of {samples} samples have no {parts}, or these are not next to each other: "
            f"{incomplete[0]} has {', '.join(members_seen)}; or leave them out with --on-bad-image skip"
        )
    return np.array(rows, np.int64).reshape(-1, 4 + 2 * len(paired)), len(incomplete), checksum.hexdigest()[:16]


def _paired_member(members: dict[str, tarfile.TarInfo], column: str) -> tarfile.TarInfo | None:
    """The paired image of a column ``a``: the member ``a.png``, with any accepted ending."""
    column = column.lower()
    return next((m for kind, m in members.items() if kind in {column, *(f"{column}{end}" for end in EXTENSIONS)}), None)


def _split(name: str) -> tuple[str, str]:
    """``a/b.seg.png`` as ``a/b`` and ``seg.png``."""
    folder, _, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, kind.lower()


def _members(url: str) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file, without hidden ones. Raises: ValueError if it is damaged or cut short."""
    with ExitStack() as closing:
        file = closing.enter_context(open_file(url))
        try:
            tar = closing.enter_context(tarfile.open(fileobj=file, mode="r:"))
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # or tarfile would hold all of them
                last = member.name.rpartition("/")[2]
                if member.issparse():
                    raise ValueError(f"{member.name} is stored as a sparse file; pack the shard without --sparse")
                if member.isfile() and not last.startswith((".", "__")) and "." in last:
                    yield member
            end = tar.offset  # tarfile silently takes a damaged header for the end
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise ValueError(f"damaged or cut short at byte {end}; copy it again")
        except (tarfile.TarError, EOFError) as error:
            hint = "; unpack a compressed tar file first" if url.endswith(("gz", "bz2", "xz", "zst")) else ""
            raise ValueError(f"not a complete tar file ({error}){hint}; copy it again") from None
