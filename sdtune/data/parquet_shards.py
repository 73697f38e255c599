"""Parquet files, on disk or remote. A shard is a row group, which is in memory while a window covers it."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from sdtune.config.sections import Captions, Data, UserError
from sdtune.data.files import name_of, open_file, read_with_retries
from sdtune.data.metadata import caption_column, parse_captions
from sdtune.data.shard_order import IntArray
from sdtune.data.shards import Record, Shards, index_shards


def open_parquet_shards(
    cfg: Data, urls: list[str], captions: Captions | None, paired: Sequence[str] = ()
) -> "ParquetShards":
    """Index the parquet files at ``urls`` by their footers; for the other arguments see ``open_tar_shards``."""
    how = " ".join(["parquet", cfg.image_column, *paired])
    found = index_shards(urls, how, lambda url: _index_parquet(url, [cfg.image_column, *paired]))
    column: str | None = None
    caption: tuple[str, ...] = ()
    if captions and captions.caption is not None:
        caption = (captions.caption,)
    elif captions:
        column = caption_column(captions, cfg.dataset, _columns(urls[0]), [cfg.image_column, *paired])
    names, counts, contents, places = [], [], [], []
    for url, index in zip(urls, found, strict=True):
        for group, rows in enumerate(np.load(index.file).tolist()):
            names.append(f"{name_of(url)}, row group {group}")
            counts.append(rows)
            contents.append(index.content)
            places.append((url, group))
    return ParquetShards(names, counts, contents, places, [cfg.image_column, *paired], column, caption)


class ParquetShards(Shards):
    """Row groups. ``places`` are the file and number of each; for the other arguments see ``Shards``.

    Args:
        images: the columns of the image and of its paired images.
    """

    def __init__(
        self,
        names: list[str],
        counts: list[int],
        contents: list[str],
        places: list[tuple[str, int]],
        images: list[str],
        column: str | None,
        caption: tuple[str, ...],
    ):
        super().__init__(names, counts, contents, [], column, caption)
        self.places, self.images = places, images

    def open(self, shard: int) -> "OpenRowGroup":
        return OpenRowGroup(self, shard)


class OpenRowGroup:
    """A row group in memory."""

    def __init__(self, shards: ParquetShards, shard: int):
        url, group = shards.places[shard]
        self.name, self.shards = shards.names[shard], shards
        columns = [*shards.images, *([shards.column] if shards.column else [])]
        self.rows = read_with_retries(url, lambda: _read(url, group, columns))

    def record(self, nth: int) -> Record:
        """Raises: ValueError if the caption cannot be used."""
        cells = [self.rows[column][nth].as_py() for column in self.shards.images]
        content, *others = [(cell["bytes"] if isinstance(cell, dict) else cell) or b"" for cell in cells]
        captions = self.shards.caption
        if self.shards.column:
            captions = parse_captions(self.rows[self.shards.column][nth].as_py())
        return Record(f"{self.name}, row {nth}", captions, content, paired=tuple(others))


def _read(url: str, group: int, columns: list[str]) -> Any:
    with ExitStack() as closing:
        return _file(url, closing).read_row_group(group, columns=columns)


def _file(url: str, closing: ExitStack) -> Any:
    import pyarrow.parquet  # takes half a second, and only this format needs it

    file = pyarrow.parquet.ParquetFile(closing.enter_context(open_file(url)), pre_buffer=True)
    return closing.enter_context(file)


def _columns(url: str) -> list[str]:
    with ExitStack() as closing:
        return list(_file(url, closing).schema_arrow.names)


def _index_parquet(url: str, images: list[str]) -> tuple[IntArray, int, str]:
    """Rows of each row group, zero, and a hash of the footer. Raises: ValueError if the file cannot be used."""
    import pyarrow

    with ExitStack() as closing:
        try:
            file = _file(url, closing)
        except pyarrow.ArrowException as error:
            raise ValueError(f"not a complete parquet file ({str(error).splitlines()[0]})") from None
        schema, metadata = file.schema_arrow, file.metadata
    for image in images:
        asked = f"--image-column {image}" if image == images[0] else f"column {image} of paired images"
        if image not in schema.names:
            raise UserError(f"{asked}: no such column in {url}; it has {', '.join(schema.names)}")
        kind = schema.field(image).type
        inner = [kind.field(i).name for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
        if "bytes" not in inner and not pyarrow.types.is_binary(kind) and not pyarrow.types.is_large_binary(kind):
            raise UserError(f"{asked} of {url} holds no images, but {kind}")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if not metadata.num_rows:
        raise ValueError("it has no rows")
    facts = repr([(g.num_rows, g.total_byte_size, g.column(0).data_page_offset) for g in groups])
    return np.array([g.num_rows for g in groups], np.int64), 0, hashlib.sha256(facts.encode()).hexdigest()[:16]
