"""Images by position: which sample the p-th of a run is depends on (seed, p) alone.

A sample is an image, a crop, a flip and a caption; each is drawn from a generator of its own, named by what
it is for and by the position. So any process can ask for any position in any order, an interrupted run goes
on with ``stream[p]``, and no sampler has a state. Positions ``[s * group, (s + 1) * group)`` make step s,
whatever part of a step is a process, an accumulation or a batch (``positions``).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from sdtune.config.sections import UserError
from sdtune.data.buckets import Shape, candidates, nearest
from sdtune.data.images import corner, cover, decode, to_tensor
from sdtune.data.order import Order
from sdtune.data.sources import Images, Mixture, Row
from sdtune.run.rng import generator


@dataclass(frozen=True)
class Sample:
    """One image as it is shown once: ``width`` x ``height`` pixels, cut at ``left``, ``top`` in [0, 1]."""

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
    """0, or 1 when it is of the second part of a ``Mixture``."""


class Stream:
    """An endless stream of samples addressed by position.

    ``Order`` says which image a position shows. With buckets the samples of a group have one shape; without,
    the stream does not depend on ``group``. Even positions show the first part of a ``Mixture``, odd ones the second.

    Args:
        cfg: a config with the Data section and a seed.
        group: images per optimizer step: batch x accumulation x processes.
        mode: what every image becomes: L, LA, RGB or RGBA.
    """

    def __init__(self, cfg: Any, images: Images | Mixture, group: int, mode: str = "RGB") -> None:
        self.cfg, self.images, self.group, self.mode = cfg, images, group, mode
        count, held = images.sizes[0], cfg.num_holdout_images
        if held >= count:
            left = f"{cfg.dataset} has {count} usable images"
            raise UserError(f"--num-holdout-images {held} leaves nothing to train on: {left}")
        drawn = torch.randperm(count, generator=generator(cfg.seed, "holdout")).tolist() if held else []
        held_out = sorted(drawn[:held])
        self.indices = sorted(set(range(len(images.rows))) - set(held_out))
        shapes = candidates(cfg)
        self.shapes: list[Shape] = [nearest(shapes, row.width, row.height) for row in images.rows]
        self.buckets: dict[Shape, list[int]] = {}
        for index in self.indices:
            self.buckets.setdefault(self.shapes[index], []).append(index)
        self.first = count
        self.orders = [self._order(part, len(images.sizes)) for part in range(len(images.sizes))]
        self.epoch_length = (count - held) * cfg.repeats * len(self.orders)
        self.holdout = [self._plain(index) for index in held_out]

    def __getitem__(self, position: int) -> Sample:
        """Sample ``position`` of the run, without its pixels."""
        turn, part = divmod(position, len(self.orders))
        sample = self._plain(self.orders[part][turn])
        return self._varied(sample, self.images.rows[sample.index].captions, position)

    def _varied(self, sample: Sample, captions: tuple[str, ...], position: int) -> Sample:
        """The sample with the crop, flip and caption of a position."""
        if not self.cfg.center_crop:
            left, top = torch.rand(2, generator=self._rng("crop", position)).tolist()
            sample = replace(sample, left=left, top=top)
        if self.cfg.random_flip:
            sample = replace(sample, flip=self._uniform("flip", position) < 0.5)
        return replace(sample, caption=self._caption(captions, position))

    def _order(self, part: int, parts: int) -> Order:
        """Of the images of one part; the second has draws of its own, and no repeats, since it never ends an epoch."""
        buckets = [[i for i in held if (i >= self.first) == part] for _, held in sorted(self.buckets.items())]
        seed, repeats = (self.cfg.seed, self.cfg.repeats) if part == 0 else ((self.cfg.seed, part), 1)
        return Order(seed, [held for held in buckets if held], repeats, self.group // parts or 1)

    # ---- draws

    def _rng(self, *names: object) -> torch.Generator:
        return generator(self.cfg.seed, *names)

    def _uniform(self, purpose: str, position: int) -> float:
        return torch.rand((), generator=self._rng(purpose, position)).item()

    def _plain(self, index: int) -> Sample:
        """Centre crop, no flip, first caption."""
        row, (width, height) = self.images.rows[index], self.shapes[index]
        caption = row.captions[0] if row.captions else ""
        return Sample(index, row.name, width, height, 0.5, 0.5, False, caption, int(index >= self.first))

    def _caption(self, captions: tuple[str, ...], position: int) -> str:
        cfg = self.cfg
        if not captions or (cfg.caption_dropout and self._uniform("dropout", position) < cfg.caption_dropout):
            return ""
        caption = captions[0]
        if len(captions) > 1:
            caption = captions[torch.randint(len(captions), (), generator=self._rng("caption", position)).item()]
        if not self._shuffles(caption):
            return caption
        tags = _tags(caption)
        front, rest = tags[: cfg.keep_tags], tags[cfg.keep_tags :]
        order = torch.randperm(len(rest), generator=self._rng("tags", position)).tolist()
        return ", ".join(front + [rest[i] for i in order])

    def _shuffles(self, caption: str) -> bool:
        return self.cfg.shuffle_tags and len(_tags(caption)) > self.cfg.keep_tags + 1

    # ---- pixels

    def pixels(self, sample: Sample) -> torch.Tensor:
        """float32 [C, height, width] in [-1, 1]. Raises: UserError for an image that has changed or gone."""
        try:
            image = decode(self.images.read(sample.index), self.mode)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{sample.name} could be read when training began, but not now: {error}") from error
        return to_tensor(
            image,
            sample.width,
            sample.height,
            sample.left,
            sample.top,
            sample.flip,
            self.cfg.image_interpolation_mode,
        )

    def pixel_key(self, sample: Sample) -> str:
        """Names what ``pixels(sample)`` returns: image bytes, shape, crop in pixels, flip, mode, filter."""
        row, width, height = self.images.rows[sample.index], sample.width, sample.height
        x, y = corner((row.width, row.height), width, height, sample.left, sample.top)
        flip = "-flip" if sample.flip else ""
        mode = "" if self.mode == "RGB" else f"-{self.mode}"
        return f"{row.sha256}-{width}x{height}+{x}+{y}{flip}{mode}-{self.cfg.image_interpolation_mode}"

    # ---- what can be computed once

    @property
    def pixels_cacheable(self) -> str | None:
        """None when every image has few variants (``pixel_variants``), else why not."""
        if self.cfg.center_crop or not any(self._slack(index) for index in self.indices):
            return None
        return "random crops differ each time; --center-crop makes them alike"

    def _slack(self, index: int) -> bool:
        row, shape = self.images.rows[index], self.shapes[index]
        return cover((row.width, row.height), *shape) != shape

    @property
    def text_cacheable(self) -> str | None:
        """None when ``texts`` holds every caption that the stream can give, else why not."""
        captions = (caption for index in self.indices for caption in self.images.rows[index].captions)
        return "shuffled tags differ each time" if any(map(self._shuffles, captions)) else None

    def pixel_variants(self) -> list[Sample]:
        """A sample for each ``pixel_key`` that training and holdout can ask for, if ``pixels_cacheable``."""
        variants = [self._plain(index) for index in self.indices]
        if self.cfg.random_flip:
            variants = [replace(sample, flip=flip) for sample in variants for flip in (False, True)]
        return list({self.pixel_key(sample): sample for sample in variants + self.holdout}.values())

    def texts(self) -> list[str]:
        """All captions as they are written, and the empty one, sorted."""
        return sorted({caption for row in self.images.rows for caption in row.captions} | {""})


def _tags(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


@dataclass(frozen=True)
class Positions:
    """A batch sampler: lists of positions in the order in which one process trains on them."""

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


# ---- what to read before training


def report(stream: Stream, count_tokens: Callable[[str], int] | None = None, window: int = 77) -> list[str]:
    """What a person should know of the data before training, one line each.

    Args:
        count_tokens: length of a caption in tokens, begin and end marks included; none reads no caption.
        window: the most tokens the text encoder reads, begin and end marks included.
    """
    images, rows = stream.images, stream.images.rows
    held = f", {len(stream.holdout)} more held out" if stream.holdout else ""
    if len(images.sizes) > 1:
        held += f", {images.sizes[1]} of them of the class; each step shows as many of the class as of the subject"
    steps = f"{stream.epoch_length / stream.group:.4g} steps of {stream.group} images"
    lines = [f"images: {len(stream.indices)}{held}; an epoch is {steps}"]
    if images.ignored:
        lines.append(f"other files, ignored: {len(images.ignored)} ({_few(images.ignored)})")
    if images.skipped:
        named = [f"{name}: {reason}" for name, reason in images.skipped]
        lines.append(f"bad images, left out: {len(named)} ({_few(named)})")
    if stream.cfg.buckets:
        lines.append(_bucket_line(stream))
    lines += _small_line(stream)
    copies = [count for count in Counter(row.sha256 for row in rows).values() if count > 1]
    if copies:
        lines.append(f"exact copies of other images, so seen more often: {sum(copies) - len(copies)}")
    if count_tokens:
        lines += _long_captions(rows, count_tokens, window)
    return lines


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _bucket_line(stream: Stream) -> str:
    sizes = sorted(stream.buckets.items(), key=lambda item: (-len(item[1]), item[0]))
    line = "buckets: " + ", ".join(f"{width} x {height}: {len(held)}" for (width, height), held in sizes)
    least = len(sizes[-1][1]) * stream.cfg.repeats
    share = -(-least // stream.group) * stream.group / least
    if share > 1:
        line += f"; a step has one shape, so images of the last are seen {share:.3g} times an epoch"
    return line


def _small_line(stream: Stream) -> list[str]:
    scales = []
    for index in stream.indices:
        row, (width, height) = stream.images.rows[index], stream.shapes[index]
        scales.append((max(width / row.width, height / row.height), row))
    small = [(scale, row) for scale, row in scales if scale > 1]
    if not small:
        return []
    _, row = max(small, key=lambda item: item[0])
    least = f"the smallest is {row.name}, {row.width} x {row.height}"
    return [f"images smaller than their training shape, enlarged: {len(small)} ({least})"]


def _long_captions(rows: list[Row], count_tokens: Callable[[str], int], window: int) -> list[str]:
    lengths = [(count_tokens(caption), row.name) for row in rows for caption in row.captions]
    over = sorted([(length, name) for length, name in lengths if length > window], key=lambda item: -item[0])
    if not over:
        return []
    lost = sum(length - window for length, _ in over)
    longest = ", ".join(f"{name}: {length}" for length, name in over[:3])
    head = f"captions over the text encoder's {window} tokens"
    return [f"{head}: {len(over)}, {lost} tokens lost (longest {longest})"]
