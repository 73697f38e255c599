"""Finds the caption of each image of a folder: in a file next to it, or in metadata tables."""

import difflib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from sdtune.config.sections import Captions, UserError
from sdtune.data.folder_files import FolderFiles, find_files
from sdtune.data.images import ACCEPTED, EXTENSIONS
from sdtune.data.metadata import (
    FILE_NAME,
    TABLES,
    column_named,
    listed_error,
    parse_caption_text,
    read_caption,
)

CAPTION_FILES = (".txt", ".caption")
"""Endings of caption files, in lower case."""
INSIDE_ONLY = "captions and metadata are never read from outside of it: copy the files into it"


def tables_of(files: FolderFiles) -> dict[str, Path]:
    """The metadata tables, by name."""
    return {name: path for name, path in files.others.items() if name.rpartition("/")[2].lower() in TABLES}


def own_column(columns: list[str], image_column: str) -> str | None:
    """The column that names the image of a row: ``a_file_name`` for image column ``a``, else ``file_name``."""
    return column_named(f"{image_column}_{FILE_NAME}", columns) or column_named(FILE_NAME, columns)


def file_columns(columns: list[str]) -> list[str]:
    """The columns that name images."""
    return [column for column in columns if column.casefold().endswith(FILE_NAME)]


def caption_files(files: FolderFiles) -> dict[str, list[str]]:
    """Name of an image -> names of its caption files: ``a.txt``, ``a.caption`` or ``a.png.txt`` for ``a.png``."""
    found: dict[str, list[str]] = {}
    for name in sorted(files.others):
        base, dot, ending = name.rpartition(".")
        if f"{dot}{ending}".lower() in CAPTION_FILES:
            found.setdefault(base, []).append(name)
    owners = {image: found.get(image, []) + found.get(image.rpartition(".")[0], []) for image in files.images}
    return {image: names for image, names in owners.items() if names}


def has_captions(folder: Path) -> bool:
    """Whether a folder has a metadata table, or an image in it a caption file."""
    try:
        files = find_files(folder, str(folder), follow_links=True)
    except UserError:
        return False
    return bool(tables_of(files) or caption_files(files))


def read_caption_files(
    files: FolderFiles, texts: dict[str, list[str]], options: Captions, default: str | None, notes: list[str]
) -> dict[str, tuple[str, ...]]:
    """The captions of each image.

    Args:
        default: of images without a caption file; ``None`` if every image needs one.
        notes: gets lines that the user should read.

    Raises: UserError that names all images without a caption, and all files that cannot be read.
    """
    files.refuse_outside((name for names in texts.values() for name in names), INSIDE_ONLY)
    found: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    joined = 0
    for image in sorted(files.images):
        names = texts.get(image, [])
        if not names and default is None:
            problems.append(f"{image}: no {image.rpartition('.')[0]}.txt")
            continue
        if len(names) > 1:
            problems.append(f"{image}: has captions in {' and in '.join(names)}; remove all but one")
            continue
        try:
            text = read_caption(files.others[names[0]]) if names else ""
            joined += len(text.strip().splitlines()) > 1
            found[image] = parse_caption_text(text, options.caption_per_line, default)
        except (OSError, ValueError) as error:
            problems.append(f"{names[0]}: {error}")
    if problems:
        head = f"{files.folder}: every image needs a caption; correct these, or give --caption for all"
        raise listed_error(head, problems)
    if joined and not options.caption_per_line:
        notes.append(
            f"caption files with several lines, joined to one caption: {joined}; if each line is a caption of its own, "
            "--caption-per-line draws one each time"
        )
    return found


@cache
def _below(parent: Path, folder: Path) -> str:
    """What comes before the names of files in ``parent``: its path in ``folder``, with a slash at the end."""
    path = os.path.relpath(parent, folder)
    return "" if path == "." else f"{Path(path).as_posix()}/"


class ImageNames:
    """Finds the image that a table means by a file name."""

    def __init__(self, images: Iterable[str]):
        self.images = set(images)
        self.other_case = 0
        """How many names differed in case from the name of the image."""

    @cached_property
    def folded(self) -> dict[str, list[str]]:
        """The names by what they are without a difference of upper and lower case."""
        found: dict[str, list[str]] = {}
        for image in self.images:
            found.setdefault(image.casefold(), []).append(image)
        return found

    @cached_property
    def stems(self) -> Counter[str]:
        """How many names there are with each stem."""
        return Counter(image.rpartition(".")[0] for image in self.images)

    def find(self, file_name: Any, parent: Path, folder: Path, stem_is_enough: bool) -> str:
        """The name of the image.

        Args:
            parent: the folder of the table.
            stem_is_enough: whether the name may lack its ending.

        Raises: ValueError that says what is wrong; LookupError if there is no such image.
        """
        if not isinstance(file_name, str) or not file_name:
            raise ValueError("file_name is missing")
        plain = unicodedata.normalize("NFC", _below(parent, folder) + file_name)
        if plain in self.images:  # as nearly always, and to resolve a path takes a hundred times as long
            return plain
        if "://" in file_name:
            raise ValueError(f"{file_name} is a URL; download the image into the folder")
        inside = os.path.relpath(os.path.normpath(parent / file_name), folder)
        if inside.startswith("..") or Path(file_name).is_absolute() or re.match(r"[A-Za-z]:[\\/]", file_name):
            raise ValueError(f"{file_name} is outside of the dataset folder; copy the image into it")
        name = unicodedata.normalize("NFC", Path(inside).as_posix())
        if name in self.images:
            return name
        if stem_is_enough and self.stems[name] == 1:
            return next(image for image in self.images if image.rpartition(".")[0] == name)
        if len(alike := self.folded.get(name.casefold(), [])) == 1:
            self.other_case += 1
            return alike[0]
        if Path(name).suffix.lower() not in EXTENSIONS and not stem_is_enough:
            raise ValueError(f"{file_name} is not one of {ACCEPTED}")
        raise LookupError(name)


def read_tables(
    files: FolderFiles,
    tables: dict[str, Path],
    image_column: str,
    choose: Callable[[list[str]], str],
    parse: Callable[[Any], Any],
    notes: list[str],
    otherwise: str = "",
    default: Any = None,
) -> dict[str, Any]:
    """The values of each image in the tables, from the column that ``choose`` picks, read by ``parse``.

    Args:
        notes: gets lines that the user should read.
        otherwise: another way out, for the message.
        default: of images without a row; ``None`` if every image needs a row.
    """
    files.refuse_outside(tables, INSIDE_ONLY)
    names = ImageNames(files.images)
    found: dict[str, Any] = {}
    places: dict[str, str] = {}  # of the first row of each image
    problems: list[str] = []
    for table, path in sorted(tables.items()):
        columns, rows, broken = files.table(table)
        problems += broken
        if not rows:
            problems += [] if broken else [f"{table}: no rows"]
            continue
        key = own_column(columns, image_column)
        if key is None:
            raise UserError(f"{path}: no column {FILE_NAME}, which finds the image; it has {', '.join(columns)}")
        column = choose(columns)
        parent, stem_is_enough = path.parent, path.suffix.lower() == ".json"
        for place, row in rows:
            try:
                name = names.find(row.get(key), parent, files.folder, stem_is_enough)
                if name in places:
                    raise ValueError(f"{name} has a row already at {places[name]}")
                places[name] = place
                found[name] = parse(row.get(column))
            except ValueError as error:
                problems.append(f"{place}: {error}")
            except LookupError:
                # Comparing names is slow, and only the first problems are shown.
                guesses = files.images if len(problems) < 10 and len(files.images) < 5000 else ()
                close = difflib.get_close_matches(row[key], guesses, 1, 0.8)
                guess = f"; did you mean {close[0]}?" if close else ""
                problems.append(f"{place}: there is no image {row[key]}{guess}")
    unnamed = sorted(files.images.keys() - places.keys())
    if default is not None:
        found |= dict.fromkeys(unnamed, default)
    else:
        problems += [f"{name}: no row in {' or '.join(sorted(tables))}" for name in unnamed]
    if problems:
        raise listed_error(f"{files.folder}: images and metadata do not match; correct these{otherwise}", problems)
    if names.other_case:
        notes.append(
            f"file names in the metadata that differ from the image's in upper and lower case: {names.other_case}"
        )
    return found
