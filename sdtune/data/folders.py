"""Reads a folder of images with metadata tables, or with a caption file next to each image."""

import re
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdtune.config.sections import Captions, Data, Masks, UserError
from sdtune.data.cache_folder import local_stamp
from sdtune.data.folder_captions import (
    CAPTION_FILES,
    caption_files,
    file_columns,
    read_caption_files,
    read_tables,
    tables_of,
)
from sdtune.data.folder_files import FolderFiles, find_files
from sdtune.data.metadata import (
    Listing,
    caption_column,
    column_of,
    edit_columns,
    listed_error,
    parse_captions,
    parse_class,
)
from sdtune.data.paired import Paired, find_paired, set_paired_aside

_REPEATED = re.compile(r"(\d{1,3})_(.+)")
_TEXT_LIKE = frozenset(
    {".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".xml", ".xlsx", ".md", ".npz", *CAPTION_FILES}
)
"""Endings of files that may hold captions, and do not in the form that is read."""


def read_folder(
    cfg: Data,
    folder: Path,
    captions: Captions | None,
    default_caption: str | None,
    class_from: str | None,
    leave_out: Path | None = None,
    paired: Paired = MappingProxyType({}),
) -> Listing:
    """All images below the folder, sorted by name.

    Args:
        captions: options of the captions that every image needs; ``None`` reads no captions.
        default_caption: of images that have no caption of their own.
        class_from: the column of the classes; ``folder`` for the names of the folders; ``None`` for no classes.
        leave_out: a folder below it that is not read.
        paired: the columns of paired images that every image needs.

    Raises: UserError that names all files that are missing or cannot be used.
    """
    files = find_files(folder, cfg.dataset, cfg.follow_links, leave_out)
    tables = tables_of(files)
    set_paired_aside(files, tables, cfg.image_column, paired)
    texts = caption_files(files)
    notes: list[str] = []
    found: dict[str, tuple[str, ...]] = dict.fromkeys(files.images, ())
    if captions is not None:
        found = _captions(cfg, files, captions, tables, texts, default_caption, notes)
    classes: dict[str, Any] = dict.fromkeys(files.images)
    if class_from == "folder":
        classes = _from_folders(files)
    elif class_from and not tables:
        raise UserError(
            f"--class-column {class_from}: {folder} has no metadata; `--class-column folder` takes the folders' names"
        )
    elif class_from:
        choose = partial(column_of, "--class-column", class_from, dataset=cfg.dataset)
        classes = read_tables(files, tables, cfg.image_column, choose, parse_class, [])
    names = sorted(files.images)
    masks = [files.masks.get(name) for name in names]
    pairs = {column: find_paired(files, tables, cfg.image_column, column, option) for column, option in paired.items()}
    notes += _notes(cfg, files, pairs)
    used = {*tables, *(name for image in texts for name in texts[image])}
    return Listing(
        dataset=str(folder),
        cache_name=str(folder.resolve()),
        keys=[f"{name}:{local_stamp(files.images[name])}" for name in names],
        names=names,
        captions=[found[name] for name in names],
        classes=[classes[name] for name in names],
        sources=[files.images[name] for name in names],
        ignored=sorted({*files.ignored, *(files.others.keys() - used)}),
        repeats=[_repeats(name) for name in names] if cfg.folder_repeats else [],
        masks=masks if isinstance(cfg, Masks) and cfg.masked_loss and not cfg.mask_column else [],
        notes=notes,
        paired={column: _listing_of(files, [found[name] for name in names]) for column, found in pairs.items()},
        edits=_edits(cfg, files, tables, names),
    )


def _edits(cfg: Data, files: FolderFiles, tables: dict[str, Path], names: list[str]) -> list[tuple[str, str]]:
    """The captions of each image before and after its edit, where they are asked for."""
    texts = []
    for column, option in edit_columns(cfg).items():
        if not tables:
            raise UserError(f"{option} {column}: {files.folder} has no metadata, which holds the captions of an edit")
        choose = partial(column_of, option, column, dataset=cfg.dataset)
        texts.append(read_tables(files, tables, cfg.image_column, choose, parse_captions, []))
    return [(texts[0][name][0], texts[1][name][0]) for name in names] if texts else []


def _listing_of(files: FolderFiles, names: list[str]) -> Listing:
    """Paired images, in the order of the images that they belong to."""
    paths = [files.paired.get(name) or files.images[name] for name in names]
    return Listing(
        dataset=str(files.folder),
        cache_name=str(files.folder.resolve()),
        keys=[f"{name}:{local_stamp(path)}" for name, path in zip(names, paths, strict=True)],
        names=names,
        captions=[()] * len(names),
        classes=[None] * len(names),
        sources=paths,
    )


def _captions(
    cfg: Data,
    files: FolderFiles,
    captions: Captions,
    tables: dict[str, Path],
    texts: dict[str, list[str]],
    default: str | None,
    notes: list[str],
) -> dict[str, tuple[str, ...]]:
    """The captions of each image: one for all, of the tables, of caption files or of the folders' names."""
    if captions.caption is not None:
        return dict.fromkeys(files.images, (captions.caption,))
    if tables:
        return read_tables(
            files,
            tables,
            cfg.image_column,
            lambda columns: caption_column(
                captions, cfg.dataset, columns, [*file_columns(columns), *edit_columns(cfg)]
            ),
            partial(parse_captions, default=default),
            notes,
            ", or give --caption",
            None if default is None else (default,),
        )
    if texts and captions.caption_column is not None:
        raise UserError(f"--caption-column {captions.caption_column}: {files.folder} has caption files, not metadata")
    of_folders = {name: match[2] for name in files.images if cfg.folder_repeats and (match := _repeated(name))}
    if not texts and default is None and not of_folders:
        there = sorted(name for name in files.others if Path(name).suffix.lower() in _TEXT_LIKE)
        others = f"; it has {', '.join(there[:5])}, which is not read" if there else ""
        named = next((name.split("/")[-2] for name in sorted(files.images) if _repeated(name)), None)
        repeats = f", or --folder-repeats, which captions images in {named} with that name" if named else ""
        raise UserError(
            f"{files.folder}: the images have no captions{others}; add metadata.jsonl with lines such as "
            f'{{"file_name": "a.png", "text": "a cat"}}, or a.txt next to a.png, or give --caption{repeats}'
        )
    if of_folders:
        bare = {name: (text,) for name, text in of_folders.items() if name not in texts}
        notes.append(f"images captioned with the name of their folder: {len(bare)}")
        rest = FolderFiles(files.folder, {n: p for n, p in files.images.items() if n not in bare}, others=files.others)
        return bare | read_caption_files(rest, texts, captions, default, notes)
    return read_caption_files(files, texts, captions, default, notes)


def _repeated(name: str) -> re.Match[str] | None:
    """The repeats and the words of a folder such as ``10_sks toy``, in the layout of kohya's scripts."""
    return _REPEATED.fullmatch(name.split("/")[-2]) if "/" in name else None


def _repeats(name: str) -> int:
    match = _repeated(name)
    return max(1, int(match[1])) if match else 1


def _notes(cfg: Data, files: FolderFiles, pairs: dict[str, dict[str, str]]) -> list[str]:
    notes = []
    if files.own:
        notes.append(f"written by sdtune, left out: {_first(files.own)}")
    if files.linked:
        notes.append(f"links to folders, not read without --follow-links: {_first(files.linked)}")
    if left := files.paired.keys() - {name for found in pairs.values() for name in found.values()}:
        notes.append(f"images that belong to others, not trained on: {len(left)} ({_first(list(left), 3)})")
    if files.masks:
        used = isinstance(cfg, Masks) and cfg.masked_loss
        end = "their images are weighted by them" if used else "not trained on"
        if isinstance(cfg, Masks) and not used:
            end += "; --masked-loss weighs the loss by them"
        notes.append(f"masks: {len(files.masks)}, {end}")
    if isinstance(cfg, Masks) and cfg.masked_loss and not cfg.mask_column and len(files.masks) < len(files.images):
        notes.append(f"images without a mask, which count in full: {len(files.images) - len(files.masks)}")
    folders = sorted({name.split("/")[-2] for name in files.images if _repeated(name)})
    if folders and not cfg.folder_repeats:
        notes.append(
            f"folders named like kohya's repeats: {_first(folders)}; their images are shown as often as others; "
            "--folder-repeats takes the numbers"
        )
    elif folders:
        notes.append(f"repeats by the names of folders: {_first(folders)}")
    return notes


def _first(names: list[str], most: int = 5) -> str:
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _from_folders(files: FolderFiles) -> dict[str, str]:
    """The class of each image by the name of its folder."""
    if stray := [name for name in sorted(files.images) if "/" not in name]:
        head = f"{files.folder}: --class-column folder needs each image in a folder named as its class; these are not"
        raise listed_error(head, stray)
    return {name: name.split("/")[-2] for name in files.images}
