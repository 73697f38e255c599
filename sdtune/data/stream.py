"""Samples by position in the run. The sample at position p depends on (seed, p) only.

A sample is an image, a crop, a flip and a caption. Each is drawn from its own generator, which is seeded by a name and
the position. So any process can ask for any position in any order, an interrupted run continues with ``stream[p]``,
and no sampler has a state. Positions ``[s * group, (s + 1) * group)`` make step s, however a step is divided into
processes, accumulation and batches (``positions``).
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdtune.config.sections import Captions, Data, Masks, Run, UserError
from sdtune.config.slow_imports import keeping
from sdtune.data.buckets import Shape, nearest_shape, training_shapes
from sdtune.data.images import corner, cover, decode, to_tensor
from sdtune.data.mixture import Mixture
from sdtune.data.order import Order
from sdtune.data.sources import Images
from sdtune.run.rng import generator

SEPARATOR = "|||"
"""In a caption: the tags before it stay in front when tags are shuffled, those after a second one at the end."""


@dataclass(frozen=True)
class Sample:
    """One image as it is shown at a position: ``width`` x ``height`` pixels, cropped at ``left``, ``top`` in [0, 1]."""

    index: int
    """Its row in ``images.rows``."""
    name: str
    width: int
    height: int
    left: float
    top: float
    flip: bool
    caption: str
    part: int
    """The part of a ``Mixture`` that it is of, else 0."""
    edit: tuple[str, str] | None = None
    """Captions of the image before its edit and after it, if they are read."""

    @property
    def crop(self) -> tuple[int, int, float, float, bool]:
        """What `to_tensor` makes of the image."""
        return self.width, self.height, self.left, self.top, self.flip


class Stream:
    """An endless stream of samples, addressed by position.

    ``Order`` gives the image of a position. With buckets the samples of a group have one shape; without buckets
    the stream does not depend on ``group``. The parts of a ``Mixture`` take turns, a position each.

    Args:
        cfg: a config with the sections Data and Run; options of Captions are read if it has them.
        group: images per optimizer step: batch x accumulation x processes.
        mode: the mode to which all images are converted: L, LA, RGB or RGBA.

    Raises: UserError if all images are held out.
    """

    images: Images | Mixture
    holdout: list[Sample]

    def __init__(self, cfg: Data, images: Images | Mixture, group: int, mode: str = "RGB") -> None:
        self._configure(cfg, group, mode)
        self.images = images
        if self.masked and not any(row.mask for row in images.rows):
            raise UserError(
                f"--masked-loss: {cfg.dataset} has no masks, such as a-mask.png next to a.png; leave it out"
            )
        self.part_of = [part for part, size in enumerate(images.sizes) for _ in range(size)]
        count, held = sum(images.sizes[: images.subjects]), cfg.num_holdout_images
        if held >= count:
            left = f"{cfg.dataset} has {count} usable images"
            raise UserError(f"--num-holdout-images {held} leaves nothing to train on: {left}")
        drawn = torch.randperm(count, generator=generator(self.seed, "holdout")).tolist() if held else []
        held_out = sorted(drawn[:held])
        self.indices = sorted(set(range(len(images.rows))) - set(held_out))
        shapes = training_shapes(cfg)
        self.shapes: list[Shape] = [nearest_shape(shapes, row.width, row.height) for row in images.rows]
        self.buckets: dict[Shape, list[int]] = {}
        for index in self.indices:
            self.buckets.setdefault(self.shapes[index], []).extend([index] * images.rows[index].repeats)
        shown = Counter(self.part_of[i] for i in self.indices for _ in range(images.rows[i].repeats))
        of_subjects = [shown[part] for part in range(images.subjects)]
        if not all(of_subjects):
            raise UserError(f"--num-holdout-images {held} leaves nothing of one of the {images.subjects} concepts")
        self.orders = [self._order(part, len(images.sizes)) for part in range(len(images.sizes))]
        self.epoch_length = max(of_subjects) * cfg.repeats * len(self.orders)
        self.holdout = [self._unaugmented(index) for index in held_out]

    def _configure(self, cfg: Data, group: int, mode: str) -> None:
        assert isinstance(cfg, Run)
        self.cfg: Data = cfg
        self.seed, self.group, self.mode = cfg.seed, group, mode
        self.caption_options = cfg if isinstance(cfg, Captions) else None

    def __getitem__(self, position: int) -> Sample:
        """The sample at ``position``, without its pixels."""
        turn, part = divmod(position, len(self.orders))
        sample = self._unaugmented(self.orders[part][turn])
        return self._augmented(sample, self.images.rows[sample.index].captions, position)

    def _augmented(self, sample: Sample, captions: tuple[str, ...], position: int) -> Sample:
        """``sample`` with the crop, flip and caption of a position."""
        if not self.cfg.center_crop:
            left, top = torch.rand(2, generator=self._rng("crop", position)).tolist()
            sample = replace(sample, left=left, top=top)
        if self.cfg.random_flip:
            sample = replace(sample, flip=self._uniform("flip", position) < 0.5)
        return replace(sample, caption=self._caption(captions, position))

    def _order(self, part: int, parts: int) -> Order:
        """The order of the images of one part. Each has draws of its own, and those of a class have no repeats."""
        buckets = [[i for i in bucket if self.part_of[i] == part] for _, bucket in sorted(self.buckets.items())]
        seed: object = self.seed if part == 0 else (self.seed, part)
        repeats = self.cfg.repeats if part < self.images.subjects else 1
        return Order(seed, [bucket for bucket in buckets if bucket], repeats, self.group // parts or 1)

    def examples(self, count: int) -> list[Sample]:
        """Some images to show, without augmentation: those held out, else the first ones."""
        return self.holdout[:count] or [self._unaugmented(index) for index in self.indices[:count]]

    # ---- draws

    def _rng(self, *names: object) -> torch.Generator:
        return generator(self.seed, *names)

    def _uniform(self, purpose: str, position: int) -> float:
        return float(torch.rand((), generator=self._rng(purpose, position)))

    def _unaugmented(self, index: int) -> Sample:
        """Centre crop, no flip, first caption."""
        row, (width, height) = self.images.rows[index], self.shapes[index]
        caption = without_separators(row.captions[0]) if row.captions else ""
        return Sample(index, row.name, width, height, 0.5, 0.5, False, caption, self.part_of[index], row.edit)

    def _caption(self, captions: tuple[str, ...], position: int) -> str:
        options = self.caption_options
        if not captions or options is None:
            return ""
        if options.caption_dropout and self._uniform("dropout", position) < options.caption_dropout:
            return ""
        caption = captions[0]
        if len(captions) > 1:
            drawn = torch.randint(len(captions), (), generator=self._rng("caption", position))
            caption = captions[int(drawn)]
        if not self._shuffles(caption):
            return without_separators(caption)
        front, tags, back = _parts(caption, options.keep_tags)
        order = torch.randperm(len(tags), generator=self._rng("tags", position)).tolist()
        return ", ".join([*front, *(tags[i] for i in order), *back])

    def _shuffles(self, caption: str) -> bool:
        options = self.caption_options
        return options is not None and options.shuffle_tags and len(_parts(caption, options.keep_tags)[1]) > 1

    # ---- pixels

    def pixels(self, sample: Sample, paired: str | None = None) -> torch.Tensor:
        """float32 [C, height, width] in [-1, 1] of a sample, or of its paired image of column ``paired``.

        Raises: UserError for an image that has changed or gone.
        """
        images = self.images.paired[paired] if paired else self.images
        try:
            image = decode(images.read(sample.index), self.mode)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{sample.name} could be read when training began, but not now: {error}") from error
        return to_tensor(image, *sample.crop, self.cfg.image_interpolation_mode)

    @property
    def masked(self) -> bool:
        """Whether the loss is weighted by masks."""
        return isinstance(self.cfg, Masks) and self.cfg.masked_loss

    def mask(self, sample: Sample) -> torch.Tensor:
        """The mask of ``pixels(sample)``, with the same crop and flip: float32 [1, height, width] in [0, 1]."""
        file = self.images.mask(sample.index)
        if file is None:
            return torch.ones(1, sample.height, sample.width)
        try:
            image = decode(file, "L")
        except (OSError, ValueError, SyntaxError) as error:
            named = file if isinstance(file, Path) else f"the mask of {sample.name}"
            raise UserError(f"{named} could be read when training began, but not now: {error}") from error
        return (to_tensor(image, *sample.crop, "box") + 1) / 2

    def pixel_key(self, sample: Sample, paired: str | None = None) -> Any:
        """A key for ``pixels(sample, paired)``: image bytes, shape, crop in pixels, flip, mode, filter."""
        images = self.images.paired[paired] if paired else self.images
        row, width, height = images.rows[sample.index], sample.width, sample.height
        x, y = corner((row.width, row.height), width, height, sample.left, sample.top)
        flip = "-flip" if sample.flip else ""
        mode = "" if self.mode == "RGB" else f"-{self.mode}"
        return f"{row.sha256}-{width}x{height}+{x}+{y}{flip}{mode}-{self.cfg.image_interpolation_mode}"

    def sizes(self, sample: Sample) -> tuple[int, int, int, int, int, int]:
        """Height and width of the image, top and left of its crop, height and width of the crop.

        The crop is in pixels of the image after resizing, and after mirroring if the sample is flipped. SDXL is told
        these sizes (Podell et al. 2023, section 2.2).
        """
        size = self.image_size(sample)
        x, y = corner(size, sample.width, sample.height, sample.left, sample.top)
        if sample.flip:
            x = cover(size, sample.width, sample.height)[0] - sample.width - x
        return size[1], size[0], y, x, sample.height, sample.width

    def image_size(self, sample: Sample) -> tuple[int, int]:
        """Width and height of the image file."""
        row = self.images.rows[sample.index]
        return row.width, row.height

    # ---- what can be cached

    @property
    def pixels_cacheable(self) -> str | None:
        """None if all ``pixel_variants`` can be listed, else the reason why not."""
        if self.cfg.center_crop or not any(self._slack(index) for index in self.indices):
            return None
        return "random crops differ each time; use --center-crop"

    def _slack(self, index: int) -> bool:
        row, shape = self.images.rows[index], self.shapes[index]
        return cover((row.width, row.height), *shape) != shape

    @property
    def text_cacheable(self) -> str | None:
        """None if ``texts`` holds every caption that the stream can give, else the reason why not."""
        captions = (caption for index in self.indices for caption in self.images.rows[index].captions)
        return "shuffled tags differ each time" if any(map(self._shuffles, captions)) else None

    @keeping()
    def pixel_variants(self, columns: Sequence[str | None] = ()) -> dict[str, tuple[Sample, str | None]]:
        """All that ``pixels`` is asked for, by ``pixel_key``, paired images too; if ``pixels_cacheable`` is None."""
        variants = [self._unaugmented(index) for index in self.indices]
        if self.cfg.random_flip:
            variants = [replace(sample, flip=flip) for sample in variants for flip in (False, True)]
        return {self.pixel_key(s, of): (s, of) for s in variants + self.holdout for of in (None, *columns)}

    def texts(self) -> list[str]:
        """All captions without shuffling, and the empty caption, sorted."""
        return sorted({without_separators(caption) for row in self.images.rows for caption in row.captions} | {""})


def _tags(caption: str) -> list[str]:
    """Tags between commas, also those of Chinese and Japanese."""
    return [tag.strip() for tag in re.split("[,，、]", caption) if tag.strip()]


def _parts(caption: str, keep_tags: int) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay in front, those that are shuffled, and those that stay at the end.

    ``|||`` separates the three, as in kohya's scripts; without it the first ``keep_tags`` stay in front.
    """
    if SEPARATOR in caption:
        front, tags, *back = (_tags(part) for part in caption.split(SEPARATOR, 2))
        return front, tags, back[0] if back else []
    tags = _tags(caption)
    return tags[:keep_tags], tags[keep_tags:], []


def without_separators(caption: str) -> str:
    """A caption in its own order; ``|||`` becomes a comma."""
    return ", ".join(tag for part in _parts(caption, 0) for tag in part) if SEPARATOR in caption else caption


@dataclass(frozen=True)
class Positions:
    """A batch sampler: lists of positions, in the order in which one process trains on them."""

    first_step: int
    steps: int
    batch: int
    accumulation: int
    rank: int
    world: int

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.first_step + self.steps):
            for k in range(self.accumulation):
                first = ((step * self.world + self.rank) * self.accumulation + k) * self.batch
                yield list(range(first, first + self.batch))


def positions(first_step: int, steps: int, batch: int, accumulation: int, rank: int, world: int) -> Positions:
    """The batches of ``rank`` for ``steps`` optimizer steps, micro-batch after micro-batch."""
    return Positions(first_step, steps, batch, accumulation, rank, world)
