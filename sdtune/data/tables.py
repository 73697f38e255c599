"""Reads a table of images with ``datasets``: saved by ``save_to_disk``, downloaded, or on the Hub."""

import difflib
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdtune.config.sections import Captions, Data, Model, SavedModel, UserError
from sdtune.data.builtin import BUILT_IN
from sdtune.data.cache_folder import local_stamp
from sdtune.data.folder_files import refuse_files_outside
from sdtune.data.images import EXTENSIONS
from sdtune.data.metadata import (
    TABLES,
    Listing,
    caption_column,
    column_of,
    edit_columns,
    listed_error,
    parse_captions,
    parse_class,
)
from sdtune.data.paired import Paired

_FORMS = (
    "a folder of images, a Hub id such as user/name, a .parquet file, a dataset saved by save_to_disk, or "
    f"{' or '.join(BUILT_IN)}"
)


def is_table(folder: Path) -> bool:
    """Whether ``datasets`` can load the folder: a saved dataset, or parquet files as in a copy of a Hub repository."""
    if _is_saved(folder) or any(path.name.lower() not in TABLES for path in (folder / "data").glob("*.parquet")):
        return True
    with os.scandir(folder) as entries:  # before all of it is listed
        if any(_is_image(entry.name) for entry in entries):
            return False  # a folder of images
    found = False
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(map(_is_image, names)):
            return False
        found |= any(name.endswith(".parquet") and name.lower() not in TABLES for name in names)
    return found


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122  fast


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_dataset(
    cfg: Data,
    folder: Path,
    captions: Captions | None,
    default_caption: str | None,
    class_from: str | None,
    paired: Paired = MappingProxyType({}),
) -> Listing:
    """The split of a dataset, with undecoded images. The arguments are those of ``read_folder``."""
    is_file = folder.suffix == ".parquet" and folder.is_file()
    if not folder.is_dir() and not is_file and not _is_hub_id(cfg.dataset):
        raise UserError(f"--dataset {cfg.dataset}: {_missing(folder)}; give {_FORMS}")
    import datasets  # takes a second, and folders do not need it

    from_images = False
    try:
        if folder.is_dir() and _is_saved(folder):
            table = datasets.load_from_disk(str(folder))
        else:
            at = "parquet" if is_file else str(folder) if folder.is_dir() else cfg.dataset
            cache_dir = cfg.cache_dir if isinstance(cfg, Model | SavedModel) else None
            options = {"data_files": str(folder)} if is_file else {"revision": cfg.dataset_revision}
            builder = datasets.load_dataset_builder(
                at, cfg.dataset_config_name, cache_dir=cache_dir and str(cache_dir), **options
            )
            if not is_file:
                _refuse_files_outside(cfg, folder, chain(*(builder.config.data_files or {}).values()))
            builder.download_and_prepare()
            table = builder.as_dataset()
            from_images = True
    except UserError:
        raise
    except Exception as error:  # of the library, the Hub or the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        here = "" if folder.is_dir() else ", and there is no such folder"
        raise UserError(f"--dataset {cfg.dataset} cannot be loaded: {reason}{here}; give {_FORMS}") from error
    if isinstance(table, datasets.DatasetDict):
        if cfg.split not in table:
            raise UserError(f"--split {cfg.split}: no such split in {cfg.dataset}; it has {', '.join(table)}")
        table = table[cfg.split]
    if not from_images:
        _refuse_files_outside(cfg, folder, (file["filename"] for file in table.cache_files))
    table = table.with_format(None)
    listing = _list_table(cfg, table, captions, default_caption, class_from)
    listing.paired = {column: _list_images(cfg, table, column, option) for column, option in paired.items()}
    for part in (listing, *listing.paired.values()):
        if from_images and table.info.builder_name == "imagefolder":
            part.table_folder = Path("/")  # the library itself wrote the paths, of the files that it downloaded
        elif folder.is_dir():
            part.table_folder = folder.resolve()
    return listing


def split_files(cfg: Data) -> list[str]:
    """The parquet or tar files of a split, as paths or ``hf://`` URLs of one commit; none is downloaded."""
    folder = Path(cfg.dataset).expanduser()
    if not folder.is_dir() and not _is_hub_id(cfg.dataset):
        raise UserError(
            f"--dataset {cfg.dataset}: {_missing(folder)}; --streaming needs a Hub id, or the names of tar shards"
        )
    import datasets  # takes a second, and folders do not need it

    at = str(folder) if folder.is_dir() else cfg.dataset
    try:
        builder = datasets.load_dataset_builder(at, cfg.dataset_config_name, revision=cfg.dataset_revision)
        splits = builder.config.data_files or {}
    except Exception as error:  # of the library, the Hub or the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--dataset {cfg.dataset} cannot be loaded: {reason}") from error
    if cfg.split not in splits:
        raise UserError(f"--split {cfg.split}: no such split in {cfg.dataset}; it has {', '.join(splits)}")
    files = [str(file) for file in splits[cfg.split]]
    _refuse_files_outside(cfg, folder, files)
    kinds = {file.rpartition(".")[2] for file in files}
    if kinds not in ({"parquet"}, {"tar"}):
        has = ", ".join(sorted(f".{kind}" for kind in kinds))
        raise UserError(f"--streaming: reads .parquet or .tar files, and {cfg.dataset} has {has}; leave it out")
    return files


def _refuse_files_outside(cfg: Data, folder: Path, files: Iterable[Any]) -> None:
    refuse_files_outside(cfg.dataset, folder if folder.is_dir() else None, map(str, files), cfg.follow_links)


def _list_table(
    cfg: Data, table: Any, captions: Captions | None, default_caption: str | None, class_from: str | None
) -> Listing:
    import datasets

    listing = _list_images(cfg, table, cfg.image_column, "--image-column")
    columns: list[str] = table.column_names
    if captions is not None and captions.caption is not None:
        listing.captions = [(captions.caption,)] * len(table)
    elif captions is not None and default_caption is not None and not (captions.caption_column or "text" in columns):
        listing.captions = [(default_caption,)] * len(table)
    elif captions is not None:
        others = [name for name in columns if _has_images(table, name) or name in edit_columns(cfg)]
        column = caption_column(captions, cfg.dataset, columns, others)
        head = f"{cfg.dataset}: every image needs a caption; or give --caption for all"
        listing.captions = _parsed(table[column], partial(parse_captions, default=default_caption), head)
    if class_from:
        column = column_of("--class-column", class_from, columns, cfg.dataset)
        cells, feature = table[column], table.features[column]
        if isinstance(feature, datasets.ClassLabel):
            # -1 stands for a missing class.
            cells = [feature.names[cell] if cell is not None and cell >= 0 else None for cell in cells]
        listing.classes = _parsed(cells, parse_class, f"{cfg.dataset}: every image needs a class in column {column}")
    texts = []
    for name, option in edit_columns(cfg).items():
        head = f"{cfg.dataset}: every image needs a caption in column {name} ({option})"
        texts.append(_parsed(table[column_of(option, name, columns, cfg.dataset)], parse_captions, head))
    listing.edits = [(before[0], after[0]) for before, after in zip(*texts, strict=True)] if texts else ()
    return listing


def _list_images(cfg: Data, table: Any, column: str, option: str) -> Listing:
    """The images of a column, which ``option`` names, without captions and classes."""
    import datasets

    columns = ", ".join(table.column_names)
    if column not in table.column_names:
        raise UserError(f"{option} {column}: no such column in {cfg.dataset}; it has {columns}")
    if not _has_images(table, column):
        raise UserError(f"{option} {column} of {cfg.dataset} holds no images; it has {columns}")
    if not len(table):
        raise UserError(f"--dataset {cfg.dataset}: no images in split {cfg.split}")
    # The fingerprint alone is not enough: one made by `map` over files stays the same when the files change.
    stamps = [local_stamp(Path(file["filename"])) for file in table.cache_files]
    count = len(table)
    return Listing(
        dataset=cfg.dataset,
        cache_name=f"{table._fingerprint} {column} {stamps}",
        keys=[str(i) for i in range(count)],
        names=[f"row {i}" for i in range(count)],
        captions=[()] * count,
        classes=[None] * count,
        sources=list(range(count)),
        table=table.select_columns([column]).cast_column(column, datasets.Image(decode=False)),
    )


def _has_images(table: Any, column: str) -> bool:
    import datasets

    feature = table.features[column]
    is_struct = isinstance(feature, dict) and "bytes" in feature  # as pandas writes an image of datasets
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or is_struct or is_bytes


def _parsed(cells: Iterable[Any], parse: Callable[[Any], Any], head: str) -> list[Any]:
    """``parse`` of each cell. Raises: UserError that begins with ``head`` and names the rows that cannot be read."""
    found: list[Any] = []
    problems: list[str] = []
    for number, value in enumerate(cells):
        try:
            found.append(parse(value))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        raise listed_error(head, problems)
    return found


def read_cell(table: Any, row: int, folder: Path | None) -> Path | bytes:
    """The bytes of an image in a table of undecoded images, or the path of its file.

    Args:
        folder: where such files may be; ``None`` if none is read, since a table can name any file of the machine.

    Raises: ValueError for a file elsewhere.
    """
    (image,) = table[row].values()
    if image is None:
        return b""
    content: bytes | None = image["bytes"]
    if content is not None:
        return content
    path = image["path"] or ""
    if folder is None or not path or not (folder / path).resolve().is_relative_to(folder):
        raise ValueError(f"holds no image but a path, {path!r}, which is not read; save the dataset with its images")
    return folder / path


def _is_hub_id(dataset: str) -> bool:
    """Whether it is ``user/name``. If there is a folder ``user`` here, it is more likely a mistyped path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", dataset)) and not Path(dataset).parent.is_dir()


def _missing(folder: Path) -> str:
    if folder.exists():
        return "not a folder"
    parent = folder.absolute().parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, siblings, 1)
    if close:
        return f"no such folder; did you mean {folder.parent / close[0]}?"
    close = difflib.get_close_matches(str(folder), BUILT_IN, 1)
    return f"no such folder; did you mean {close[0]}?" if close else "no such folder"
