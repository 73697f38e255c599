"""Loads the images and captions of a folder, of a dataset saved by ``datasets``, or of the Hub.

Every source gives the same list of rows: name, captions, upright size and hash of each image. Everything that is wrong
with a dataset is found here, before training, and one message names all problems of a kind.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sdtune.config.sections import Captions, Data, Run, UserError
from sdtune.data.buckets import nearest_shape, training_shapes
from sdtune.data.builtin import BUILT_IN
from sdtune.data.folders import read_folder
from sdtune.data.image_info import inspect_images
from sdtune.data.metadata import Listing, listed_error
from sdtune.data.shard_names import is_sharded
from sdtune.data.tables import is_table, read_cell, read_dataset
from sdtune.run.rng import generator


@dataclass(frozen=True)
class Row:
    """One image: its name in the dataset, its captions, its size in pixels when upright, the hash of its bytes."""

    name: str
    captions: tuple[str, ...]
    width: int
    height: int
    sha256: str
    mode: str = "RGB"
    """The smallest Pillow mode that loses nothing: L, LA, RGB or RGBA."""
    label: str | None = None
    """Its class, if classes are read."""


def with_captions(images: "Images", captions: Sequence[str]) -> "Images":
    """The same images, each with ``captions`` instead of its own. One of them is drawn each time."""
    rows = [replace(row, captions=tuple(captions)) for row in images.rows]
    return replace(images, rows=rows)


@dataclass
class Images:
    """The images of a run, checked. ``read(i)`` gives the file or the bytes of ``rows[i]``."""

    rows: list[Row]
    ignored: list[str]
    """Names of files that are not used."""
    skipped: list[tuple[str, str]]
    """Names of bad images that are left out by ``--on-bad-image skip``, and what is wrong with each."""
    sources: Sequence[Path | int]
    """For each row its file, or its row in ``table``."""
    table: Any = None
    """A ``datasets.Dataset`` of one column; None for a folder."""
    fingerprint: str = field(init=False)
    """Hash of names, image bytes, captions and classes. It does not depend on where the dataset is."""

    def __post_init__(self) -> None:
        listed: list[Any] = [(r.name, r.sha256, r.captions, *([r.label] if r.label else [])) for r in self.rows]
        self.fingerprint = hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()

    @property
    def sizes(self) -> list[int]:
        """Images of each part that a stream shows in turn. There is one part."""
        return [len(self.rows)]

    def read(self, index: int) -> Path | bytes:
        """The file of an image, or its bytes."""
        source = self.sources[index]
        return source if isinstance(source, Path) else read_cell(self.table, source)

    @property
    def classes(self) -> list[str]:
        """The names of all classes, sorted as numbers if all are whole numbers, else by the alphabet."""
        names = {row.label for row in self.rows if row.label is not None}
        if all(re.fullmatch(r"-?\d+", name) for name in names):
            return sorted(names, key=int)
        return sorted(names)


class Mixture:
    """Two sets of images. A stream shows them in turn, so half of its images are of each set, whatever their sizes."""

    def __init__(self, first: Images, second: Images):
        self.parts = (first, second)
        self.rows = [*first.rows, *second.rows]
        self.ignored, self.skipped = first.ignored + second.ignored, first.skipped + second.skipped
        self.fingerprint = first.fingerprint + second.fingerprint

    @property
    def sizes(self) -> list[int]:
        return [len(part.rows) for part in self.parts]

    def read(self, index: int) -> Path | bytes:
        first, second = self.parts
        own = len(first.rows)
        return first.read(index) if index < own else second.read(index - own)


def caption_options(cfg: Data, captions: bool) -> Captions | None:
    """The options of ``cfg`` for captions; None if captions are not read."""
    if not captions:
        return None
    assert isinstance(cfg, Captions)
    return cfg


def load_images(
    cfg: Data, captions: bool = True, default_caption: str | None = None, class_column: str | None = None
) -> Images:
    """Find, read and check the dataset of ``cfg``.

    Args:
        captions: whether every image needs a caption; else no captions are read.
        default_caption: of images that have no caption of their own.
        class_column: the column of the classes; ``folder`` for the names of the folders; ``None`` for no classes.

    Raises: UserError for everything that is wrong with the dataset.
    """
    if cfg.dataset not in BUILT_IN and is_sharded(cfg.dataset):
        raise UserError(
            f"--dataset {cfg.dataset}: tar shards are for lora, text-to-image and ddpm; unpack them into a folder"
        )
    folder = BUILT_IN[cfg.dataset]() if cfg.dataset in BUILT_IN else Path(cfg.dataset).expanduser()
    read = read_folder if folder.is_dir() and not is_table(folder) else read_dataset
    return _check_images(cfg, read(cfg, folder, caption_options(cfg, captions), default_caption, class_column))


def _check_images(cfg: Data, found: Listing) -> Images:
    """Inspect the images of a listing. Raises: UserError that names all bad and too small images."""
    count = len(found.names)
    chosen = list(range(count))
    if cfg.max_train_samples is not None:
        assert isinstance(cfg, Run)
        drawn = torch.randperm(count, generator=generator(cfg.seed, "max_train_samples"))
        chosen = sorted(drawn[: cfg.max_train_samples].tolist())

    def read(index: int) -> Path | bytes:
        source = found.sources[chosen[index]]
        return source if isinstance(source, Path) else read_cell(found.table, source)

    infos = inspect_images(found.cache_name, [found.keys[i] for i in chosen], read)

    shapes = training_shapes(cfg)
    bad: dict[int, str] = {}
    small: dict[int, str] = {}
    for i, info in zip(chosen, infos, strict=True):
        if info.problem:
            bad[i] = info.problem
            continue
        width, height = nearest_shape(shapes, info.width, info.height)
        if max(width / info.width, height / info.height) > 4:
            small[i] = f"{info.width} x {info.height} is less than a quarter of {width} x {height}"
    skip = bad | small
    for problems, head in (
        (bad, "cannot be read: repair or remove them, or leave them out with --on-bad-image skip"),
        (small, "too small: lower --resolution, or leave them out with --on-bad-image skip"),
    ):
        if problems and (cfg.on_bad_image == "error" or len(skip) == len(chosen)):
            lines = [f"{found.names[i]}: {problem}" for i, problem in problems.items()]
            raise listed_error(f"{found.dataset}: {len(problems)} of {len(chosen)} images {head}", lines)

    rows = [
        Row(found.names[i], found.captions[i], info.width, info.height, info.sha256, info.mode, found.classes[i])
        for i, info in zip(chosen, infos, strict=True)
        if i not in skip
    ]
    skipped = [(found.names[i], skip[i]) for i in chosen if i in skip]
    sources = [found.sources[i] for i in chosen if i not in skip]
    return Images(rows, found.ignored, skipped, sources, found.table)
