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
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from sdtune.config.sections import Captions, Data, Masks, Run, UserError
from sdtune.config.slow_imports import keeping
from sdtune.data.buckets import nearest_shape, training_shapes
from sdtune.data.builtin import BUILT_IN
from sdtune.data.cache_folder import local_stamp
from sdtune.data.folders import read_folder
from sdtune.data.image_info import inspect_images
from sdtune.data.images import ImageInfo
from sdtune.data.metadata import Listing, listed_error
from sdtune.data.paired import Paired, mask_column, pair_problem, with_mask
from sdtune.data.shard_names import is_sharded
from sdtune.data.tables import is_table, read_cell, read_dataset
from sdtune.run.rng import generator


class Row(NamedTuple):
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
    repeats: int = 1
    """How often an epoch shows it, for each of ``--repeats``."""
    mask: str | None = None
    """Hash of its mask, if masks are used."""
    edit: tuple[str, str] | None = None
    """Captions of the image before its edit and after it, if they are read."""


def with_captions(images: "Images", captions: Sequence[str]) -> "Images":
    """The same images, each with ``captions`` instead of its own. One of them is drawn each time."""
    rows = [row._replace(captions=tuple(captions)) for row in images.rows]
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
    table_folder: Path | None = None
    """Where image files that the table only names may lie; None if none is read."""
    masks: Sequence[Path | None] = ()
    """For each row its mask; empty if masks are not used, or are paired images."""
    mask_column: str | None = None
    """The column of paired images that are the masks."""
    notes: Sequence[str] = ()
    """Lines that the user should read."""
    paired: dict[str, "Images"] = field(default_factory=dict)
    """Paired images of the same rows, by their column."""
    fingerprint: str = field(init=False)
    """Hash of names, image bytes, captions and classes. It does not depend on where the dataset is."""

    def __post_init__(self) -> None:
        listed: list[Any] = [
            (r.name, r.sha256, r.captions, *filter(None, (r.label, r.mask, r.repeats > 1 and r.repeats)), *hashes)
            for r, *hashes in zip(self.rows, *([r.sha256 for r in p.rows] for p in self.paired.values()), strict=True)
        ]
        self.fingerprint = hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()

    subjects = 1
    """Parts that show what is to be learnt: see ``Mixture``."""

    @property
    def sizes(self) -> list[int]:
        """Images of each part that a stream shows in turn. There is one part."""
        return [len(self.rows)]

    def read(self, index: int) -> Path | bytes:
        """The file of an image, or its bytes."""
        source = self.sources[index]
        return source if isinstance(source, Path) else read_cell(self.table, source, self.table_folder)

    def mask(self, index: int) -> Path | bytes | None:
        """The file of the mask of an image, or its bytes, if it has one and masks are used."""
        if self.mask_column:
            return self.paired[self.mask_column].read(index)
        return self.masks[index] if self.masks else None

    @property
    def classes(self) -> list[str]:
        """The names of all classes, sorted as numbers if all are whole numbers, else by the alphabet."""
        names = {row.label for row in self.rows if row.label is not None}
        if all(re.fullmatch(r"-?\d+", name) for name in names):
            return sorted(names, key=int)
        return sorted(names)


def caption_options(cfg: Data, captions: bool) -> Captions | None:
    """The options of ``cfg`` for captions; None if captions are not read."""
    if not captions:
        return None
    assert isinstance(cfg, Captions)
    return cfg


@keeping()
def load_images(
    cfg: Data,
    captions: bool = True,
    default_caption: str | None = None,
    class_column: str | None = None,
    leave_out: Path | None = None,
    paired: Paired = MappingProxyType({}),
) -> Images:
    """Find, read and check the dataset of ``cfg``.

    Args:
        captions: whether every image needs a caption; else no captions are read.
        default_caption: of images that have no caption of their own.
        class_column: the column of the classes; ``folder`` for the names of the folders; ``None`` for no classes.
        leave_out: a folder below the dataset's that is not read.
        paired: the columns of paired images, which every image needs; they get its crop and flip.

    Raises: UserError for everything that is wrong with the dataset.
    """
    if cfg.dataset not in BUILT_IN and is_sharded(cfg.dataset):
        raise UserError(f"--dataset {cfg.dataset}: this method reads no tar shards; unpack them into a folder")
    folder = BUILT_IN[cfg.dataset]() if cfg.dataset in BUILT_IN else Path(cfg.dataset).expanduser()
    options, paired = caption_options(cfg, captions), with_mask(cfg, paired)
    if folder.is_dir() and not is_table(folder):
        found = read_folder(cfg, folder, options, default_caption, class_column, leave_out, paired)
        return _check_images(cfg, found)
    if isinstance(cfg, Masks) and cfg.masked_loss and not cfg.mask_column:
        raise UserError(f"--masked-loss: {cfg.dataset} is a table; name the column of the masks with --mask-column")
    return _check_images(cfg, read_dataset(cfg, folder, options, default_caption, class_column, paired))


def _check_images(cfg: Data, found: Listing) -> Images:
    """Inspect the images of a listing. Raises: UserError that names all bad and too small images."""
    count = len(found.names)
    chosen = list(range(count))
    if cfg.max_train_samples is not None:
        assert isinstance(cfg, Run)
        drawn = torch.randperm(count, generator=generator(cfg.seed, "max_train_samples"))
        chosen = sorted(drawn[: cfg.max_train_samples].tolist())

    infos = _inspected(found, chosen)
    pairs = {column: _inspected(other, chosen) for column, other in found.paired.items()}

    shapes, of_mask = training_shapes(cfg), mask_column(cfg)
    bad: dict[int, str] = {}
    small: dict[int, str] = {}
    for nth, (i, info) in enumerate(zip(chosen, infos, strict=True)):
        if problem := pair_problem(info, {column: of[nth] for column, of in pairs.items()}, cfg.first_frame):
            bad[i] = problem
            continue
        if of_mask and pairs[of_mask][nth].blank:
            bad[i] = f"its {of_mask} is all black, so nothing of it would be trained on"
            continue
        width, height = nearest_shape(shapes, info.width, info.height)
        if max(width / info.width, height / info.height) > 4:
            small[i] = f"{info.width} x {info.height} is less than a quarter of {width} x {height}"
    skip = bad | small
    for problems, head in (
        (bad, "cannot be used: repair or remove them, or leave them out with --on-bad-image skip"),
        (small, "too small: lower --resolution, or leave them out with --on-bad-image skip"),
    ):
        if problems and (cfg.on_bad_image == "error" or len(skip) == len(chosen)):
            lines = [f"{found.names[i]}: {problem}" for i, problem in problems.items()]
            raise listed_error(f"{found.dataset}: {len(problems)} of {len(chosen)} images {head}", lines)

    used = {i: info for i, info in zip(chosen, infos, strict=True) if i not in skip}
    masks = _check_masks(found, used)
    if of_mask:
        masks = {i: info.sha256 for i, info in zip(chosen, pairs[of_mask], strict=True)}
    rows = [
        Row(
            name=found.names[i],
            captions=found.captions[i],
            width=info.width,
            height=info.height,
            sha256=info.sha256,
            mode=info.mode,
            label=found.classes[i],
            repeats=found.repeats[i] if found.repeats else 1,
            mask=masks.get(i),
            edit=found.edits[i] if found.edits else None,
        )
        for i, info in used.items()
    ]
    return Images(
        rows=rows,
        ignored=found.ignored,
        skipped=[(found.names[i], skip[i]) for i in chosen if i in skip],
        sources=[found.sources[i] for i in used],
        table=found.table,
        table_folder=found.table_folder,
        masks=[found.masks[i] for i in used] if found.masks else (),
        mask_column=of_mask,
        notes=[*found.notes, *_pixel_notes(found, used)],
        paired={
            column: _paired_images(other, dict(zip(chosen, pairs[column], strict=True)), list(used))
            for column, other in found.paired.items()
        },
    )


def _inspected(found: Listing, chosen: list[int]) -> list[ImageInfo]:
    """The facts of the images ``chosen`` of a listing."""

    def read(index: int) -> Path | bytes:
        source = found.sources[chosen[index]]
        return source if isinstance(source, Path) else read_cell(found.table, source, found.table_folder)

    return inspect_images(found.cache_name, [found.keys[i] for i in chosen], read)


def _paired_images(found: Listing, infos: dict[int, ImageInfo], used: list[int]) -> Images:
    rows = [Row(found.names[i], (), infos[i].width, infos[i].height, infos[i].sha256, infos[i].mode) for i in used]
    return Images(rows, [], [], [found.sources[i] for i in used], found.table, found.table_folder)


def _pixel_notes(found: Listing, used: dict[int, ImageInfo]) -> list[str]:
    notes = []
    if dim := [found.names[i] for i, info in used.items() if info.dim]:
        some = ", ".join(dim[:3])
        notes.append(f"16-bit images without a value above 4095, which therefore stay dark: {len(dim)} ({some})")
    if frames := [found.names[i] for i, info in used.items() if info.frames > 1]:
        notes.append(f"images with several frames, of which the first is used: {len(frames)} ({', '.join(frames[:3])})")
    return notes


def _check_masks(found: Listing, used: dict[int, ImageInfo]) -> dict[int, str]:
    """The hash of the mask of each image that has one. Raises: UserError that names all masks that cannot be used."""
    paths = {i: path for i in used if found.masks and (path := found.masks[i])}
    keys = [f"{path}:{local_stamp(path)}" for path in paths.values()]
    infos = inspect_images(f"{found.cache_name} masks", keys, list(paths.values()).__getitem__)
    problems, hashes = [], {}
    for (i, path), info in zip(paths.items(), infos, strict=True):
        image = used[i]
        if info.problem:
            problems.append(f"{path}: {info.problem}")
        elif info.blank:
            problems.append(f"{path}: is all black, so nothing of {found.names[i]} would be trained on")
        elif abs(info.width * image.height - info.height * image.width) > 0.02 * info.width * image.height:
            sizes = f"{info.width} x {info.height}, and its image {image.width} x {image.height}"
            problems.append(f"{path}: has another shape than its image: {sizes}")
        hashes[i] = info.sha256
    if problems:
        head = f"{found.dataset}: masks that cannot be used; correct these, or leave out --masked-loss"
        raise listed_error(head, problems)
    return hashes
