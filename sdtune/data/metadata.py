"""The text beside images: metadata tables, caption files, and what counts as a caption or a class.

A table is ``metadata.jsonl``, ``.csv`` or ``.parquet`` with a column ``file_name`` (the imagefolder
convention); a caption file is ``a.txt`` beside ``a.png`` (kohya's).
"""

import csv
import difflib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtune.config.sections import Data, UserError

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

_LISTED = 10  # problems in one message; the rest is counted


@dataclass
class Found:
    """What a source holds before any image is looked at; the lists run in parallel."""

    dataset: str
    """What messages call it."""
    memo: str
    """Under which name the probes of its images are kept ..."""
    keys: list[str]
    """... and under which key each; both together change when an image does."""
    names: list[str]
    captions: list[tuple[str, ...]]
    classes: list[str | None]
    sources: list[Path] | list[int]
    """Per image its file, or its row in ``table``."""
    ignored: list[str] = field(default_factory=list)
    table: Any = None
    """A ``datasets.Dataset`` of the one column of images."""


def problem_list(head: str, problems: list[str]) -> UserError:
    """One error for all problems of a kind: the head says what to do, a line names each."""
    shown = problems[:_LISTED]
    if len(problems) > _LISTED:
        shown.append(f"... and {len(problems) - _LISTED} more")
    return UserError("\n  ".join([head, *shown]))


def caption_column(cfg: Data, columns: list[str], other: str) -> str:
    """``cfg.caption_column``, else ``text``, else the only column beside ``other``, which finds the image.

    Raises: UserError that lists the columns.
    """
    rest = [column for column in columns if column != other]
    there = ", ".join(columns) or "none"
    if cfg.caption_column is not None:
        if cfg.caption_column in columns:
            return cfg.caption_column
        raise UserError(f"--caption-column {cfg.caption_column}: no such column in {cfg.dataset}; it has {there}")
    if "text" in rest:
        return "text"
    if len(rest) == 1:
        return rest[0]
    if not rest:
        raise UserError(f"{cfg.dataset} has no captions (columns: {there}): add a column `text`, or give --caption")
    raise UserError(f"{cfg.dataset}: say with --caption-column which column is the caption; it has {there}")


def parse_captions(value: Any, default: str | None = None) -> tuple[str, ...]:
    """The captions in a cell, which holds a string or a list of them; ``default`` where it holds none.

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
            raise ValueError(f"the caption is {json.dumps(text, default=str)[:40]}, which is not text")
        if not text.strip():
            raise ValueError("the caption is empty")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError("the caption holds half a character (a lone surrogate)")
    return tuple(text.strip() for text in texts)


def class_column(name: str, columns: list[str], dataset: str) -> str:
    """``name``, the column of the class. Raises: UserError that lists the columns."""
    if name in columns:
        return name
    close = difflib.get_close_matches(name, columns, 1)
    hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(columns) or 'none'}"
    raise UserError(f"--class-column {name}: no such column in {dataset}{hint}")


def parse_class(value: Any) -> str:
    """The name of the class in a cell, which holds a text or a whole number.

    Raises: ValueError that says what is wrong.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("the class is missing")
    if not isinstance(value, str | int):
        raise ValueError(f"the class is {json.dumps(value, default=str)[:40]}, neither a name nor a whole number")
    return str(value).strip()


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises: ValueError that names the line."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 text; save the file as UTF-8") from None


def read_table(path: Path, shown: str) -> tuple[list[str], list[tuple[str, dict[str, Any]]], list[str]]:
    """The columns, the rows, each with its place as ``shown:line``, and the problems of a metadata table."""
    try:
        if path.suffix == ".parquet":
            rows, problems = _parquet(path, shown)
        else:
            rows, problems = (_csv if path.suffix == ".csv" else _jsonl)(read_text(path), shown)
    except (OSError, ValueError) as error:
        return [], [], [f"{shown}: {str(error).splitlines()[0]}"]
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    return columns, rows, problems


Table = tuple[list[tuple[str, dict[str, Any]]], list[str]]


def _jsonl(text: str, shown: str) -> Table:
    rows, problems = [], []
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
    import pyarrow.parquet  # half a second, and only this format needs it

    table = pyarrow.parquet.read_table(path)
    return [(f"{shown}: row {number}", row) for number, row in enumerate(table.to_pylist())], []
