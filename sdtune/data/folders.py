"""Reads a folder of images with metadata tables, or with a caption file next to each image."""

import difflib
import os
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sdtune.config.sections import Captions, Data, UserError
from sdtune.data.cache_folder import local_stamp
from sdtune.data.images import ACCEPTED, EXTENSIONS
from sdtune.data.metadata import (
    TABLES,
    Listing,
    caption_column,
    class_column,
    listed_error,
    parse_captions,
    parse_class,
    read_metadata,
    read_text,
)


def read_folder(
    cfg: Data,
    folder: Path,
    captions: Captions | None,
    default_caption: str | None,
    class_from: str | None,
) -> Listing:
    """All images below the folder, sorted by name.

    Args:
        captions: options of the captions that every image needs; ``None`` reads no captions.
        default_caption: of images that have no caption of their own.
        class_from: the column of the classes; ``folder`` for the names of the folders; ``None`` for no classes.
    """
    files, ignored = _walk(folder)
    images = {name: path for name, path in files.items() if path.suffix.lower() in EXTENSIONS}
    if not images:
        raise UserError(f"--dataset {cfg.dataset}: no images in {folder.absolute()}; accepted are {ACCEPTED}")
    tables = {name: path for name, path in files.items() if path.name in TABLES}
    stems = {name.rpartition(".")[0] for name in images}
    texts = {name[:-4]: path for name, path in files.items() if name.endswith(".txt") and name[:-4] in stems}
    ignored += files.keys() - images.keys() - tables.keys() - {f"{stem}.txt" for stem in texts}

    if captions is None:
        found: dict[str, tuple[str, ...]] = dict.fromkeys(images, ())
    elif captions.caption is not None:
        found = dict.fromkeys(images, (captions.caption,))
    elif tables:
        found = _from_tables(
            folder,
            images,
            tables,
            lambda columns: caption_column(captions, cfg.dataset, columns, "file_name"),
            partial(parse_captions, default=default_caption),
            ", or give --caption",
            None if default_caption is None else (default_caption,),
        )
    elif texts and captions.caption_column is not None:
        raise UserError(f"--caption-column {captions.caption_column}: {folder} has caption files, not metadata")
    elif texts:
        found = _from_texts(folder, images, texts, default_caption)
    elif default_caption is not None:
        found = dict.fromkeys(images, (default_caption,))
    else:
        raise UserError(
            f"{folder}: the images have no captions; add metadata.jsonl with lines such as "
            '{"file_name": "a.png", "text": "a cat"}, or a.txt next to a.png, or give --caption'
        )
    names = sorted(images)
    classes: dict[str, Any] = dict.fromkeys(images)
    if class_from == "folder":
        classes = _from_folders(folder, images)
    elif class_from and not tables:
        raise UserError(
            f"--class-column {class_from}: {folder} has no metadata; `--class-column folder` takes the folders' names"
        )
    elif class_from:
        classes = _from_tables(
            folder, images, tables, lambda columns: class_column(class_from, columns, cfg.dataset), parse_class
        )
    return Listing(
        dataset=str(folder),
        cache_name=str(folder.resolve()),
        keys=[f"{name}:{local_stamp(images[name])}" for name in names],
        names=names,
        captions=[found[name] for name in names],
        classes=[classes[name] for name in names],
        sources=[images[name] for name in names],
        ignored=sorted(ignored),
    )


def _walk(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Files by their name below the folder, and what is not read: hidden files, linked folders, devices."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    files: dict[str, Path] = {}
    ignored: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        at = Path(parent)
        for name in list(folders):
            if name.startswith(".") or (at / name).is_symlink():
                folders.remove(name)
                ignored.append(_name(at / name, folder) + "/")
        for name in names:
            path = at / name
            if name.startswith(".") or not path.is_file():
                ignored.append(_name(path, folder))
            else:
                files[_name(path, folder)] = path
    return files, ignored


def _name(path: Path, folder: Path) -> str:
    """The path below the folder, with slashes; the same whether or not the file system composes accents."""
    readable = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", readable)


def _from_texts(
    folder: Path, images: dict[str, Path], texts: dict[str, Path], default: str | None
) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for name in sorted(images):
        stem = name.rpartition(".")[0]
        if stem not in texts and default is None:
            problems.append(f"{name}: no {stem}.txt")
            continue
        try:
            text = read_text(texts[stem]) if stem in texts else ""
            found[name] = parse_captions(" ".join(text.split()), default)
        except (OSError, ValueError) as error:
            problems.append(f"{stem}.txt: {error}")
    if problems:
        raise listed_error(f"{folder}: every image needs a caption; correct these, or give --caption for all", problems)
    return found


def _from_folders(folder: Path, images: dict[str, Path]) -> dict[str, str]:
    stray = [name for name in sorted(images) if "/" not in name]
    if stray:
        head = f"{folder}: --class-column folder needs each image in a folder named as its class; these are not"
        raise listed_error(head, stray)
    return {name: name.split("/")[-2] for name in images}


def _from_tables(
    folder: Path,
    images: dict[str, Path],
    tables: dict[str, Path],
    choose: Callable[[list[str]], str],
    parse: Callable[[Any], Any],
    otherwise: str = "",
    default: Any = None,
) -> dict[str, Any]:
    """The values of each image in the tables, from the column that ``choose`` picks, read by ``parse``.

    Args:
        otherwise: another way out, for the message.
        default: of images without a row; ``None`` if every image needs a row.
    """
    found: dict[str, Any] = {}
    places: dict[str, str] = {}  # of the first row of each image
    problems: list[str] = []
    for table, path in sorted(tables.items()):
        columns, rows, broken = read_metadata(path, table)
        problems += broken
        if not rows:
            problems += [] if broken else [f"{table}: no rows"]
            continue
        if "file_name" not in columns:
            raise UserError(f"{path}: no column file_name, which finds the image; it has {', '.join(columns)}")
        column = choose(columns)
        for place, row in rows:
            try:
                name = _named(row.get("file_name"), path.parent, folder, images)
                if name in places:
                    raise ValueError(f"{name} has a row already at {places[name]}")
                places[name] = place
                found[name] = parse(row.get(column))
            except ValueError as error:
                problems.append(f"{place}: {error}")
            except LookupError:
                # Comparing names is slow, and only the first problems are shown.
                guesses = images if len(problems) < 10 and len(images) < 5000 else ()
                close = difflib.get_close_matches(row["file_name"], guesses, 1, 0.8)
                guess = f"; did you mean {close[0]}?" if close else ""
                problems.append(f"{place}: there is no image {row['file_name']}{guess}")
    where = " or ".join(sorted(tables))
    unnamed = sorted(images.keys() - places.keys())
    if default is not None:
        found |= dict.fromkeys(unnamed, default)
    else:
        problems += [f"{name}: no row in {where}" for name in unnamed]
    if problems:
        raise listed_error(f"{folder}: images and metadata do not match; correct these{otherwise}", problems)
    return found


def _named(file_name: Any, parent: Path, folder: Path, images: dict[str, Path]) -> str:
    """The image that a row names. Raises: ValueError that says what is wrong; LookupError if there is no such image."""
    if not isinstance(file_name, str) or not file_name:
        raise ValueError("file_name is missing")
    if "://" in file_name:
        raise ValueError(f"{file_name} is an address; download the image into the folder")
    outside = f"{file_name} is outside of the dataset folder; copy the image into it"
    inside = os.path.relpath(os.path.normpath(parent / file_name), folder)
    if inside.startswith("..") or Path(file_name).is_absolute() or re.match(r"[A-Za-z]:[\\/]", file_name):
        raise ValueError(outside)
    name = unicodedata.normalize("NFC", Path(inside).as_posix())
    if name not in images:
        if Path(name).suffix.lower() not in EXTENSIONS:
            raise ValueError(f"{file_name} is not one of {ACCEPTED}")
        raise LookupError(name)
    home = folder.resolve()
    if home.parent.name == "snapshots":  # in the Hub's cache, where files are links to blobs/ two folders up
        home = home.parent.parent
    if not images[name].resolve().is_relative_to(home):
        raise ValueError(outside)
    return name
