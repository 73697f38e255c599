"""Reads metadata tables and caption files, and checks captions and classes.

A table is ``metadata.jsonl``, ``.csv`` or ``.parquet`` with a column ``file_name`` (the imagefolder convention), or
``captions.json``, an object of captions by file name. A caption file is ``a.txt`` next to ``a.png`` (the convention of
sd-scripts).
"""

import csv
import difflib
import io
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtune.config.fields import flag
from sdtune.config.sections import Captions, Data, EditCaptions, UserError

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.json")
"""Names of tables, in lower case."""

FILE_NAME = "file_name"
"""Column of a table that names the image, or the end of a column that names another image of the row."""

MAX_CAPTION = 20_000
"""Most characters of a caption. A text encoder reads a few hundred; a tokenizer takes a minute for 20 million."""

MAX_CAPTION_FILE = 1_000_000
"""Bytes of a file that holds the captions of one image."""

_LISTED = 10  # problems in one message; the rest is counted
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Table = tuple[list[tuple[str, dict[str, Any]]], list[str]]
"""Rows, each with its place as ``file:line``, and problems."""
Metadata = tuple[list[str], list[tuple[str, dict[str, Any]]], list[str]]
"""Columns, rows and problems of a table."""


@dataclass
class Listing:
    """The images of a source before any of them is inspected. All lists have one entry for each image."""

    dataset: str
    """Its name in messages."""
    cache_name: str
    """Its name in the cache of inspected images ..."""
    keys: list[str]
    """... and the key of each image there. One of them changes when an image changes."""
    names: list[str]
    captions: list[tuple[str, ...]]
    classes: list[str | None]
    sources: Sequence[Path | int]
    """For each image its file, or its row in ``table``."""
    ignored: list[str] = field(default_factory=list)
    table: Any = None
    """A ``datasets.Dataset`` with only the column of images; None for a folder."""
    repeats: list[int] = field(default_factory=list)
    """How often an epoch shows each image; empty for once each."""
    masks: Sequence[Path | None] = ()
    """The mask of each image; empty if masks are not used."""
    notes: list[str] = field(default_factory=list)
    """Lines that the user should read."""
    table_folder: Path | None = None
    """Where image files that the table only names may be; None if none is read."""
    paired: dict[str, "Listing"] = field(default_factory=dict)
    """Paired images of each image, by their column."""
    edits: Sequence[tuple[str, str]] = ()
    """Captions of each image before and after its edit; empty if they are not read."""


def listed_error(head: str, problems: list[str]) -> UserError:
    """One error for all problems of a kind: ``head`` says what to do, and each problem is a line."""
    shown = problems[:_LISTED]
    if len(problems) > _LISTED:
        shown.append(f"... and {len(problems) - _LISTED} more")
    return UserError("\n  ".join([head, *shown]))


def caption_column(options: Captions, dataset: str, columns: list[str], others: Collection[str]) -> str:
    """The column of the captions: ``--caption-column``, else ``text``, else the only column that is not of ``others``.

    Raises: UserError that lists the columns.
    """
    rest = [column for column in columns if column not in others]
    there = ", ".join(columns) or "none"
    if options.caption_column is not None:
        if given := column_named(options.caption_column, columns):
            return given
        raise UserError(f"--caption-column {options.caption_column}: no such column in {dataset}; it has {there}")
    if text := column_named("text", rest):
        return text
    if len(rest) == 1:
        return rest[0]
    if not rest:
        raise UserError(f"{dataset} has no captions (columns: {there}): add a column `text`, or give --caption")
    raise UserError(f"{dataset}: give the column of the captions with --caption-column; the columns are {there}")


def column_named(name: str, columns: list[str]) -> str | None:
    """The column ``name``, else the only one that differs from it in upper and lower case alone."""
    if name in columns:
        return name
    alike = [column for column in columns if column.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def parse_captions(value: Any, default: str | None = None) -> tuple[str, ...]:
    """The captions in a cell, which holds a text or a list of texts; ``default`` for an empty cell.

    Raises: ValueError that says what is wrong.
    """
    if default is not None and (value is None or (isinstance(value, str) and not value.strip())):
        return (default,)
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise ValueError("the list of captions is empty")
    for text in texts:
        if text is None:
            raise ValueError("the caption is missing")
        if not isinstance(text, str):
            raise ValueError(f"the caption is {_shown(text)}, which is not text")
        if len(text) > MAX_CAPTION:
            raise ValueError(f"the caption has {len(text):,} characters; at most {MAX_CAPTION:,} are read")
        if not text.strip():
            raise ValueError("the caption is empty")
        if _LONE_SURROGATE.search(text):
            raise ValueError("the caption holds half a character (a lone surrogate)")
    return tuple(text.strip() for text in texts)


def parse_caption_text(text: str, per_line: bool, default: str | None = None) -> tuple[str, ...]:
    """The captions in the text of a caption file: its lines joined to one, or with ``per_line`` one in each line."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return parse_captions(lines if per_line and lines else " ".join(lines), default)


def edit_columns(cfg: Data) -> dict[str, str]:
    """The columns of captions before and after an edit, each with its option; empty if they are not read."""
    return {column: flag(name) for column, name in cfg.edit_columns.items()} if isinstance(cfg, EditCaptions) else {}


def column_of(option: str, name: str, columns: list[str], dataset: str) -> str:
    """``name``, the column that ``option`` asks for. Raises: UserError that lists the columns."""
    if name in columns:
        return name
    close = difflib.get_close_matches(name, columns, 1)
    hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(columns) or 'none'}"
    raise UserError(f"{option} {name}: no such column in {dataset}{hint}")


def parse_class(value: Any) -> str:
    """The name of the class in a cell, which holds a text or a whole number.

    Raises: ValueError that says what is wrong.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("the class is missing")
    if not isinstance(value, str | int):
        raise ValueError(f"the class is {_shown(value)}, neither a name nor a whole number")
    return str(value).strip()


def _shown(value: Any) -> str:
    """A value of the wrong kind, for a message; nested ones only by their kind, since they may be deep or large."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value, default=str)[:40]


def read_caption(path: Path) -> str:
    """The text of the caption file of one image. Raises: ValueError if it is too large or not UTF-8."""
    if (size := path.stat().st_size) > MAX_CAPTION_FILE:
        raise ValueError(f"has {size:,} bytes; a caption file has at most {MAX_CAPTION_FILE:,}")
    return read_text(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises: ValueError that names the line."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 text; save the file as UTF-8") from None


def read_metadata(path: Path, shown: str) -> Metadata:
    """Read a metadata table: its columns; its rows, each with its place as ``shown:line``; its problems."""
    try:
        kind = path.suffix.lower()
        if kind == ".parquet":
            rows, problems = _parquet(path, shown)
        else:
            read = {".csv": _csv, ".json": _json}.get(kind, _jsonl)
            rows, problems = read(read_text(path), shown)
    except (OSError, ValueError, RecursionError) as error:
        return [], [], [f"{shown}: {str(error).splitlines()[0]}"]
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    return columns, rows, problems


def _jsonl(text: str, shown: str) -> Table:
    rows: list[tuple[str, dict[str, Any]]] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would break at U+2028 inside a caption
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{shown}:{number}: not JSON ({error.args[0]})")
            continue
        if isinstance(row, dict):
            rows.append((f"{shown}:{number}", row))
        else:
            problems.append(f'{shown}:{number}: not an object such as {{"file_name": "a.png", "text": "a cat"}}')
    return rows, problems


def _json(text: str, shown: str) -> Table:
    """``{"a.png": "a cat"}``, or an object with ``caption`` or ``text`` for each name (kohya's metadata)."""
    content = json.loads(text)
    if not isinstance(content, dict):
        return [], [f'{shown}: not an object such as {{"a.png": "a cat"}}']
    rows: list[tuple[str, dict[str, Any]]] = []
    for name, value in content.items():
        if isinstance(value, dict):
            value = next((value[key] for key in ("text", "caption", "captions") if key in value), None)
        rows.append((f"{shown}: {name}", {"file_name": name, "text": value}))
    return rows, []


def _csv(text: str, shown: str) -> Table:
    rows: list[tuple[str, dict[str, Any]]] = []
    problems = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    line = 1
    try:
        for cells in reader:
            place, line = f"{shown}:{line}", reader.line_num + 1
            if not columns:
                columns = [cell.strip() for cell in cells]
            elif cells and len(cells) != len(columns):
                counts = f"{len(cells)} cells for {len(columns)} columns"
                problems.append(f"{place}: {counts}; put a caption with commas in quotes")
            elif cells:
                rows.append((place, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        problems.append(f"{shown}:{line}: {error}")
    return rows, problems


def _parquet(path: Path, shown: str) -> Table:
    import pyarrow.parquet  # takes half a second, and only this format needs it

    table = pyarrow.parquet.read_table(path)
    return [(f"{shown}: row {number}", row) for number, row in enumerate(table.to_pylist())], []
