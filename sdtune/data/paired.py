"""Paired images: further images of a sample, such as the edges that a ControlNet follows, by their column.

In a folder, column ``a`` is the column ``a_file_name`` of the metadata (the convention of ``datasets``), or each image
``b.png`` has ``a/b.png`` in a folder next to it. They are never samples themselves.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdtune.config.sections import Data, Masks, UserError
from sdtune.data.folder_captions import INSIDE_ONLY, ImageNames, own_column
from sdtune.data.folder_files import FolderFiles
from sdtune.data.images import ImageInfo, many_frames
from sdtune.data.metadata import FILE_NAME, column_named, listed_error

PAIRED_FOLDERS = ("conditioning_image", "input_image")
"""Folders whose images belong to those above them for every method; other folders only if a method asks for them."""

Paired = Mapping[str, str]
"""The columns of paired images, each with the option that names it, such as ``--conditioning-image-column``."""


def mask_column(cfg: Data) -> str | None:
    """The column of the masks, if they are in one."""
    return cfg.mask_column if isinstance(cfg, Masks) and cfg.masked_loss else None


def with_mask(cfg: Data, paired: Paired) -> Paired:
    """The columns of paired images, and that of the masks."""
    column = mask_column(cfg)
    return {**paired, column: "--mask-column"} if column else paired


def set_paired_aside(files: FolderFiles, tables: Mapping[str, Path], image_column: str, paired: Paired) -> None:
    """Move paired images from ``files.images`` to ``files.paired``.

    Raises: UserError if nothing is left.
    """
    names = ImageNames(files.images)
    own: set[str] = set()
    named: set[str] = set()
    for table, path in tables.items():
        columns, rows, _ = files.table(table)
        own_name = own_column(columns, image_column)
        others = [column for column in columns if column.endswith(f"_{FILE_NAME}") and column != own_name]
        if not others:
            continue
        for column in (own_name, *others):
            found = (_found(names, row.get(column), path, files) for _, row in rows) if column else ()
            (own if column == own_name else named).update(filter(None, found))
    for name in (named - own) | set(_in_paired_folders(files, {*PAIRED_FOLDERS, *paired})):
        files.paired[name] = files.images.pop(name)
    if not files.images:
        raise UserError(f"{files.folder}: all of its images belong to others, so there is none to train on")


def _in_paired_folders(files: FolderFiles, folders: set[str]) -> Iterator[str]:
    """Images in a folder ``a`` that has an image of the same name above it; then all images of that folder."""
    inside: dict[str, list[str]] = {}
    for name in files.images:
        folder = name.rpartition("/")[0]
        if folder.rpartition("/")[2] in folders:
            inside.setdefault(folder, []).append(name)
    stems = {name.rpartition(".")[0] for name in files.images} if inside else set()
    for folder, names in inside.items():
        above = folder.rpartition("/")[0]
        if any(_beside(name, above) in stems for name in names):
            yield from names


def _beside(name: str, above: str) -> str:
    """The name, without its ending, of the image in the folder ``above`` that an image belongs to."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return f"{above}/{stem}" if above else stem


def _found(names: ImageNames, value: Any, table: Path, files: FolderFiles) -> str | None:
    try:
        return names.find(value, table.parent, files.folder, table.suffix.lower() == ".json")
    except (ValueError, LookupError):
        return None  # reported where the column is asked for


def find_paired(
    files: FolderFiles, tables: Mapping[str, Path], image_column: str, column: str, option: str
) -> dict[str, str]:
    """Name of an image -> name of its paired image of ``column``.

    Raises: UserError that names the images without one, and the rows that cannot be used.
    """
    key = f"{column}_{FILE_NAME}"
    read = {table: files.table(table) for table in sorted(tables)}
    with_key = [table for table, (columns, _, _) in read.items() if column_named(key, columns)]
    if not with_key:
        return _from_folders(files, tables, column, option)
    files.refuse_outside(with_key, INSIDE_ONLY)
    images, every = ImageNames(files.images), ImageNames([*files.images, *files.paired])
    found: dict[str, str] = {}
    problems: list[str] = []
    for table in with_key:
        columns, rows, broken = read[table]
        problems += broken
        parent, own_name, named = tables[table].parent, own_column(columns, image_column), column_named(key, columns)
        for place, row in rows:
            try:
                image = images.find(row.get(own_name or ""), parent, files.folder, False)
            except (ValueError, LookupError) as error:
                problems.append(f"{place}: {_told(error)}")
                continue
            try:
                found[image] = every.find(row.get(named or ""), parent, files.folder, False)
            except (ValueError, LookupError) as error:
                problems.append(f"{place}: {key}: {_told(error)}")
    listed = {problem.partition(":")[0] for problem in problems}
    if not listed:
        problems += [f"{name}: no row with {key}" for name in sorted(files.images.keys() - found.keys())]
    if problems:
        raise listed_error(f"{files.folder}: every image needs a {column} ({option}); correct these", problems)
    return found


def _told(error: Exception) -> str:
    return f"there is no image {error}" if isinstance(error, LookupError) else str(error)


def _from_folders(files: FolderFiles, tables: Mapping[str, Path], column: str, option: str) -> dict[str, str]:
    inside: dict[str, list[str]] = {}
    for name in files.paired:
        folder = name.rpartition("/")[0]
        above, _, last = folder.rpartition("/")
        if last == column:
            inside.setdefault(_beside(name, above), []).append(name)
    if not inside:
        key = f"{column}_{FILE_NAME}"
        line = f'{{"file_name": "a.png", "{key}": "b.png", "text": "a cat"}}'
        where = (
            f"a column {key} to {' and '.join(sorted(tables))}" if tables else f"metadata.jsonl with lines as {line}"
        )
        raise UserError(
            f"{option} {column}: {files.folder} has none; add {where}, or put the {column} of a.png into {column}/a.png"
        )
    problems, found = [], {}
    for name in sorted(files.images):
        pairs = inside.get(name.rpartition(".")[0], [])
        if len(pairs) == 1:
            found[name] = pairs[0]
        else:
            folder, _, last = name.rpartition("/")
            wanted = f"{folder}/{column}/{last}" if folder else f"{column}/{last}"
            problems.append(f"{name}: both {' and '.join(sorted(pairs))}" if pairs else f"{name}: no {wanted}")
    if problems:
        raise listed_error(f"{files.folder}: every image needs a {column} ({option}); correct these", problems)
    return found


def pair_problem(image: ImageInfo, paired: Mapping[str, ImageInfo], first_frame: bool) -> str | None:
    """What is wrong with an image or with one of its paired images by column; None if they can be used."""
    if problem := own_problem(image, first_frame):
        return problem
    for column, other in paired.items():
        if problem := own_problem(other, first_frame):
            return f"its {column} {problem}" if problem.startswith("has") else f"its {column}: {problem}"
        if not same_shape((image.width, image.height), (other.width, other.height)):
            sizes = f"{other.width} x {other.height}, and the image {image.width} x {image.height}"
            return f"its {column} has another shape: {sizes}"
    return None


def own_problem(image: ImageInfo, first_frame: bool) -> str | None:
    if not image.problem and image.frames > 1 and not first_frame:
        return many_frames(image.frames)
    return image.problem


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the same crop of two images shows the same: one is the other enlarged, up to rounding to whole pixels."""
    return 2 * abs(one[0] * other[1] - other[0] * one[1]) <= max(sum(one), sum(other))
