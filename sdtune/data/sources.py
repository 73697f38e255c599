"""Where images and captions come from: a folder, a dataset saved by ``datasets``, or one on the Hub.

Whatever the source, the result is the same list of rows: name, captions, upright size and hash of the image.
All that is wrong with a dataset is found here, before training, and all problems of a kind are named at once.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sdtune.config.sections import Data, UserError
from sdtune.data.buckets import candidates, nearest
from sdtune.data.builtin import BUILT_IN
from sdtune.data.folders import read_folder
from sdtune.data.metadata import Found, problem_list
from sdtune.data.patterns import names_shards
from sdtune.data.probes import probe_all
from sdtune.data.tables import cell, is_table, read_table
from sdtune.run.rng import generator


@dataclass(frozen=True)
class Row:
    """One image: its name in the dataset, its captions, its upright size in pixels, the hash of its bytes."""

    name: str
    captions: tuple[str, ...]
    width: int
    height: int
    sha256: str
    mode: str = "RGB"
    """The smallest Pillow mode that holds all it has: L, LA, RGB or RGBA."""
    label: str | None = None
    """Its class."""


def captioned(images: "Images", captions: Sequence[str]) -> "Images":
    """The same images, each with ``captions`` in place of its own; one of them is drawn each time."""
    rows = [replace(row, captions=tuple(captions)) for row in images.rows]
    return replace(images, rows=rows)


@dataclass
class Images:
    """The images of a run, checked. ``read(i)`` gives the file or the bytes of ``rows[i]``."""

    rows: list[Row]
    ignored: list[str]
    """Names of stray files that were left alone."""
    skipped: list[tuple[str, str]]
    """Names of bad images left out on request, and what is wrong with each."""
    sources: list[Path] | list[int]
    """Per row its file, or its row in ``table``."""
    table: Any = None
    """A ``datasets.Dataset`` of one column, or none for a folder."""
    fingerprint: str = field(init=False)
    """Hash of names, image bytes, captions and classes; independent of where the dataset lies."""

    def __post_init__(self) -> None:
        listed = sorted((r.name, r.sha256, r.captions, *([r.label] if r.label else [])) for r in self.rows)
        self.fingerprint = hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    @property
    def sizes(self) -> list[int]:
        """Images of each part that a stream shows in turn; there is one."""
        return [len(self.rows)]

    def read(self, index: int) -> Path | bytes:
        """The file of an image, or its bytes."""
        source = self.sources[index]
        return source if isinstance(source, Path) else cell(self.table, source)

    @property
    def classes(self) -> list[str]:
        """The names of all classes; in order of number where all are whole numbers, else of the alphabet."""
        names = {row.label for row in self.rows if row.label is not None}
        return sorted(names, key=int if all(re.fullmatch(r"-?\d+", name) for name in names) else str)


class Mixture:
    """Two sets of images as one. A stream shows them in turn, so each makes up half, whatever their sizes."""

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


def load_images(
    cfg: Data, captions: bool = True, default: str | None = None, class_column: str | None = None
) -> Images:
    """Find, read and check the dataset of ``cfg``.

    Args:
        captions: whether every image needs one; else none is read.
        default: the caption of images that have none of their own.
        class_column: column of a table that holds the class of each image; ``folder`` means its folder's name.

    Raises: UserError for whatever is wrong with it.
    """
    if cfg.dataset not in BUILT_IN and names_shards(cfg.dataset):
        raise UserError(
            f"--dataset {cfg.dataset}: tar shards are for lora, text-to-image and ddpm; unpack them into a folder"
        )
    folder = BUILT_IN[cfg.dataset]() if cfg.dataset in BUILT_IN else Path(cfg.dataset).expanduser()
    read = read_folder if folder.is_dir() and not is_table(folder) else read_table
    return _checked(cfg, read(cfg, folder, captions, default, class_column))


def _checked(cfg: Data, found: Found) -> Images:
    count = len(found.names)
    kept = list(range(count))
    if cfg.max_train_samples is not None:
        drawn = torch.randperm(count, generator=generator(cfg.seed, "max_train_samples"))
        kept = sorted(drawn[: cfg.max_train_samples].tolist())

    def read(index: int) -> Path | bytes:
        source = found.sources[kept[index]]
        return source if isinstance(source, Path) else cell(found.table, source)

    probes = probe_all(found.memo, [found.keys[i] for i in kept], read)

    shapes = candidates(cfg)
    bad, small = {}, {}
    for i, probe in zip(kept, probes, strict=True):
        if probe.problem:
            bad[i] = probe.problem
            continue
        width, height = nearest(shapes, probe.width, probe.height)
        if max(width / probe.width, height / probe.height) > 4:
            small[i] = f"{probe.width} x {probe.height} is less than a quarter of {width} x {height}"
    skip = bad | small
    for problems, head in (
        (bad, "cannot be read: repair or remove them, or leave them out with --on-bad-image skip"),
        (small, "too small: lower --resolution, or leave them out with --on-bad-image skip"),
    ):
        if problems and (cfg.on_bad_image == "error" or len(skip) == len(kept)):
            lines = [f"{found.names[i]}: {problem}" for i, problem in problems.items()]
            raise problem_list(f"{found.dataset}: {len(problems)} of {len(kept)} images {head}", lines)

    rows = [
        Row(found.names[i], found.captions[i], probe.width, probe.height, probe.sha256, probe.mode, found.classes[i])
        for i, probe in zip(kept, probes, strict=True)
        if i not in skip
    ]
    skipped = [(found.names[i], skip[i]) for i in kept if i in skip]
    sources = [found.sources[i] for i in kept if i not in skip]
    return Images(rows, found.ignored, skipped, sources, found.table)
