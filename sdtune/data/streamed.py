"""A sharded data set as a stream of samples by position: nothing of an image is known before it is read.

So there are no buckets, no repeats and no survey of sizes and copies. An image that cannot be used is told when it
is met: it ends the run, or the next usable one of its shard is shown in its place, at the same position in every run.
"""

import sys
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from sdtune.config.sections import Classes, Data, Latents, Streaming, UserError
from sdtune.data.images import decode, probe, to_tensor
from sdtune.data.lanes import Lanes
from sdtune.data.patterns import names_shards, shard_urls
from sdtune.data.row_groups import open_row_groups
from sdtune.data.shards import Record, Shards
from sdtune.data.sources import Images, load_images
from sdtune.data.stream import Sample, Stream
from sdtune.data.tables import files_of
from sdtune.data.tars import open_tars

SHOWN = 16
"""Captions of a data set to draw sample grids of."""


def open_images(cfg: Data, captions: bool = True, class_column: str | None = None) -> Images | Shards:
    """``load_images``, or the shards of a data set that is streamed."""
    shards = names_shards(cfg.dataset)
    if isinstance(cfg, Streaming) and (shards or cfg.streaming):
        refuse_what_cannot_be(cfg)
        if shards:
            return open_tars(cfg, shard_urls(cfg.dataset), captions)
        urls = files_of(cfg)
        return (open_tars if urls[0].endswith(".tar") else open_row_groups)(cfg, urls, captions)
    if isinstance(cfg, Latents) and cfg.shard_cache:
        raise UserError("--shard-cache: is for data sets that are streamed; other ones are cached without it")
    return load_images(cfg, captions, class_column=class_column)


def open_stream(cfg: Any, images: Any, group: int, mode: str = "RGB") -> Stream:
    """The samples of what ``open_images`` gave, by position."""
    return Streamed(cfg, images, group, mode) if isinstance(images, Shards) else Stream(cfg, images, group, mode)


def refuse_what_cannot_be(cfg: Data) -> None:
    """Raises: UserError for options that want to know every image before training."""
    wants = {
        "buckets": cfg.buckets,
        "repeats": cfg.repeats > 1,
        "max-train-samples": cfg.max_train_samples,
        "class-column": isinstance(cfg, Classes) and cfg.class_column,
    }
    if given := [name for name, asked in wants.items() if asked]:
        why = "what is streamed is not looked at image by image before training"
        raise UserError(f"--{given[0]}: {why}; leave it out, or train from a folder of images")


class Streamed(Stream):
    """``Stream`` over ``Shards``; see ``Lanes`` for the order.

    The first ``--num-holdout-images`` of the first shards are held out. ``Sample.index`` counts images in the order of
    the shards' names.

    Args:
        cfg: a config with the sections Data and Streaming, and a seed.
        shards: the data set.
        group: images per optimizer step.
        mode: what every image becomes: L, LA, RGB or RGBA.
    """

    def __init__(self, cfg: Any, shards: Shards, group: int, mode: str = "RGB") -> None:
        self.cfg, self.images, self.group, self.mode = cfg, shards, group, mode
        held = cfg.num_holdout_images
        if held >= len(shards):
            left = f"{cfg.dataset} has {len(shards)} images"
            raise UserError(f"--num-holdout-images {held} leaves nothing to train on: {left}")
        self.held = (held - shards.starts[:-1]).clip(0, shards.counts)  # of each shard, its first
        self.lanes = Lanes(cfg.seed, shards.counts - self.held, group, cfg.stream_lanes, cfg.shuffle_window)
        self.epoch_length = len(shards) - held
        self._read: tuple[int, Image.Image | None] = (-1, None)

    def __getitem__(self, position: int) -> Sample:
        """Sample ``position`` of the run. Raises: UserError for an image that cannot be used, with that asked for."""
        place = self.lanes[position]
        shard, first, count = place.shard, int(self.held[place.shard]), int(self.images.counts[place.shard])
        opened = self.images.opened(shard, place.lane, place.live)
        for further in range(count - first):
            nth = first + (place.nth + further) % (count - first)
            try:
                record = opened.record(nth)
                image = self._image(record)
            except ValueError as error:
                self.refuse(f"position {position}: {self.images.names[shard]}, image {nth}", error)
                continue
            index = int(self.images.starts[shard]) + nth
            self._read = (index, image)
            return self._varied(self._sample(index, record), record.captions, position)
        raise UserError(f"{self.images.names[shard]}: no image of it can be used; leave it out")

    @cached_property
    def holdout(self) -> list[Sample]:  # type: ignore[override]
        """Held-out images, as far as that is known without their pixels."""
        try:
            return [self._sample(index, self._record(index)) for index in range(self.cfg.num_holdout_images)]
        except ValueError as error:
            raise UserError(f"--num-holdout-images: the first images are held out, and {error}") from None

    def plain(self, index: int) -> tuple[Sample, tuple[str, ...]]:
        """An image as it is shown without a draw, and its captions. Raises: ValueError if it cannot be used."""
        record = self._record(index)
        self._read = (index, self._image(record))
        return self._sample(index, record), record.captions

    def _record(self, index: int) -> Record:
        shard, nth = self.images.place(index)
        return self.images.opened(shard).record(nth)

    def _sample(self, index: int, record: Record) -> Sample:
        """Centre crop, no flip, first caption."""
        caption = record.captions[0] if record.captions else ""
        return Sample(index, record.name, self.cfg.resolution, self.cfg.resolution, 0.5, 0.5, False, caption, 0)

    def _image(self, record: Record) -> Image.Image | None:
        """None where it was encoded already. Raises: ValueError that says what is wrong with it."""
        if record.content is None:
            return None
        side = self.cfg.resolution
        try:
            image = decode(record.content, self.mode)
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them trip over
            raise ValueError(f"{record.name}: {probe(record.content).problem or error}") from None
        if side / min(image.size) > 4:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"{record.name}: {size} is less than a quarter of {side} x {side}")
        return image

    def refuse(self, where: str, error: ValueError) -> None:
        """Tell of an image that cannot be used. Raises: UserError, unless bad ones are to be passed over."""
        if self.cfg.on_bad_image == "error":
            raise UserError(
                f"{where}: {error}; mend it, or go on with --on-bad-image skip --allow-change, which shows the next one"
            ) from None
        print(f"{where}: {error}; the next one is shown in its place", file=sys.stderr)

    def pixels(self, sample: Sample) -> torch.Tensor:
        """float32 [C, height, width] in [-1, 1]."""
        if self._read[0] != sample.index:
            try:
                self._read = (sample.index, self._image(self._record(sample.index)))
            except ValueError as error:
                raise UserError(str(error)) from None
        image = self._read[1]
        assert image is not None
        return to_tensor(
            image,
            sample.width,
            sample.height,
            sample.left,
            sample.top,
            sample.flip,
            self.cfg.image_interpolation_mode,
        )

    def pixel_key(self, sample: Sample) -> tuple[int, bool]:  # type: ignore[override]
        """Under what its moments are kept."""
        return sample.index, sample.flip

    def texts(self) -> list[str]:
        """The captions of the first images."""
        found = {""}
        for index in range(min(SHOWN, len(self.images))):
            with suppress(ValueError):
                found.update(self._record(index).captions)
        return sorted(found)

    def told(self) -> list[str]:
        """What a person should know of the data before training, one line each."""
        counts = self.images.counts
        held = f", {self.cfg.num_holdout_images} more held out" if self.cfg.num_holdout_images else ""
        steps = f"{self.epoch_length / self.group:.4g} steps of {self.group} images"
        return [
            f"images: {self.epoch_length}{held}, streamed; an epoch is {steps}",
            f"shards: {len(counts)}, of {counts.min()} to {counts.max()} images; lanes: {self.lanes.lanes}, "
            f"each shuffled {self.lanes.window} at a time",
            *self.images.notes,
            "sizes, copies and lengths of captions are not surveyed; a bad image is told when it is met",
        ]
