"""Parquet files, near or on the Hub: a shard is a row group, which is read whole and kept while a window lies in it."""

import hashlib
from contextlib import ExitStack
from typing import Any

import numpy as np

from sdtune.config.sections import UserError
from sdtune.data.files import opened, patiently
from sdtune.data.metadata import caption_column, parse_captions
from sdtune.data.shards import Record, Shards, look_up


def open_row_groups(cfg: Any, urls: list[str], captions: bool) -> "RowGroups":
    """The parquet files at ``urls``, their footers read; for ``captions`` see ``open_tars``."""
    found = look_up(urls, f"parquet {cfg.image_column}", lambda url: _groups(url, cfg.image_column))
    column = caption_column(cfg, _columns(urls[0]), cfg.image_column) if captions and cfg.caption is None else None
    caption = (cfg.caption,) if captions and cfg.caption is not None else ()
    names, counts, contents, places = [], [], [], []
    for url, index in zip(urls, found, strict=True):
        for group, rows in enumerate(np.load(index.file).tolist()):
            names.append(f"{url.rpartition('/')[2]}, row group {group}")
            counts.append(rows)
            contents.append(index.content)
            places.append((url, group))
    return RowGroups(names, counts, contents, places, cfg.image_column, column, caption)


class RowGroups(Shards):
    """Args: names, rows and contents of the row groups; file and number of each; columns, or one caption for all."""

    def __init__(
        self,
        names: list[str],
        counts: list[int],
        contents: list[str],
        places: list[tuple[str, int]],
        image: str,
        column: str | None,
        caption: tuple[str, ...],
    ):
        super().__init__(names, counts, contents, [], column, caption)
        self.places, self.image = places, image

    def open(self, shard: int) -> "RowGroup":
        return RowGroup(self, shard)


class RowGroup:
    """One row group, in memory."""

    def __init__(self, shards: RowGroups, shard: int):
        url, group = shards.places[shard]
        self.name, self.shards = shards.names[shard], shards
        columns = [shards.image, *([shards.column] if shards.column else [])]
        self.rows = patiently(url, lambda: _read(url, group, columns))

    def record(self, nth: int) -> Record:
        """Raises: ValueError that says what is wrong with the caption."""
        image = self.rows[self.shards.image][nth].as_py()
        content = image["bytes"] if isinstance(image, dict) else image
        captions = self.shards.caption
        if self.shards.column:
            captions = parse_captions(self.rows[self.shards.column][nth].as_py())
        return Record(f"{self.name}, row {nth}", captions, content or b"")


def _read(url: str, group: int, columns: list[str]) -> Any:
    with ExitStack() as closing:
        return _file(url, closing).read_row_group(group, columns=columns)


def _file(url: str, closing: ExitStack) -> Any:
    import pyarrow.parquet  # half a second, and only this format needs it

    file = pyarrow.parquet.ParquetFile(closing.enter_context(opened(url)), pre_buffer=True)
    return closing.enter_context(file)


def _columns(url: str) -> list[str]:
    with ExitStack() as closing:
        return list(_file(url, closing).schema_arrow.names)


def _groups(url: str, image: str) -> tuple[np.ndarray, int, str]:
    """Rows of each row group, and a hash of the footer. Raises: ValueError if it cannot be used."""
    import pyarrow

    with ExitStack() as closing:
        try:
            file = _file(url, closing)
        except pyarrow.ArrowException as error:
            raise ValueError(f"not a whole parquet file ({str(error).splitlines()[0]})") from None
        schema, metadata = file.schema_arrow, file.metadata
    if image not in schema.names:
        raise UserError(f"--image-column {image}: no such column in {url}; it has {', '.join(schema.names)}")
    kind = schema.field(image).type
    inner = [kind.field(i).name for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
    if "bytes" not in inner and not pyarrow.types.is_binary(kind) and not pyarrow.types.is_large_binary(kind):
        raise UserError(f"--image-column {image} of {url} holds no images, but {kind}")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if not metadata.num_rows:
        raise ValueError("it has no rows")
    said = repr([(g.num_rows, g.total_byte_size, g.column(0).data_page_offset) for g in groups])
    return np.array([g.num_rows for g in groups], np.int64), 0, hashlib.sha256(said.encode()).hexdigest()[:16]
