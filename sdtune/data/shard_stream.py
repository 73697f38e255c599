"""Samples of a sharded dataset by position. Nothing is known of an image before it is read.

So there are no buckets, no repeats, and no report of sizes and copies. A bad image is reported when it is read. Then
the run ends, or the next usable image of the same shard takes its place, at the same position in every run.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from types import MappingProxyType

import torch
from PIL import Image

from sdtune.config.sections import Classes, Data, EditCaptions, Latents, Masks, Streaming, UserError
from sdtune.config.untrusted import echo
from sdtune.data.images import decode, inspect_image, to_tensor
from sdtune.data.mixture import Mixture
from sdtune.data.paired import Paired, mask_column, same_shape, with_mask
from sdtune.data.parquet_shards import open_parquet_shards
from sdtune.data.shard_names import is_sharded, shard_urls
from sdtune.data.shard_order import ShardOrder
from sdtune.data.shards import Record, Shards
from sdtune.data.sources import Images, caption_options, load_images
from sdtune.data.stream import Sample, Stream, without_separators
from sdtune.data.tables import split_files
from sdtune.data.tar_shards import open_tar_shards

PREVIEW_CAPTIONS = 16
"""How many captions of a dataset can become prompts of the sample grids."""


def open_images(
    cfg: Data, captions: bool = True, class_column: str | None = None, paired: Paired = MappingProxyType({})
) -> Images | Shards:
    """``load_images``, or the shards of a dataset that is streamed."""
    shards = is_sharded(cfg.dataset)
    if isinstance(cfg, Streaming) and (shards or cfg.streaming):
        refuse_unsupported(cfg)
        if shards:
            urls = shard_urls(cfg.dataset, cfg.follow_links)
            return open_tar_shards(cfg, urls, caption_options(cfg, captions), list(with_mask(cfg, paired)))
        urls = split_files(cfg)
        open_shards = open_tar_shards if urls[0].endswith(".tar") else open_parquet_shards
        return open_shards(cfg, urls, caption_options(cfg, captions), list(with_mask(cfg, paired)))
    if isinstance(cfg, Latents) and cfg.shard_cache:
        raise UserError("--shard-cache: only for streamed datasets; other datasets are cached without it")
    return load_images(cfg, captions, class_column=class_column, paired=paired)


def open_stream(
    cfg: Data,
    images: Images | Mixture | Shards,
    group: int,
    mode: str = "RGB",
    paired: Paired = MappingProxyType({}),
) -> Stream:
    """The samples of the images that ``open_images`` gave, with the same ``paired``."""
    return (
        ShardStream(cfg, images, group, mode, list(with_mask(cfg, paired)))
        if isinstance(images, Shards)
        else Stream(cfg, images, group, mode)
    )


def refuse_unsupported(cfg: Data) -> None:
    """Raises: UserError for options that need every image to be inspected before training."""
    needs = {
        "buckets": cfg.buckets,
        "repeats": cfg.repeats > 1,
        "max-train-samples": cfg.max_train_samples,
        "class-column": isinstance(cfg, Classes) and cfg.class_column,
        "masked-loss": isinstance(cfg, Masks) and cfg.masked_loss and not cfg.mask_column,
        "folder-repeats": cfg.folder_repeats,
        "original-caption-column": isinstance(cfg, EditCaptions) and cfg.original_caption_column,
    }
    if given := [name for name, asked in needs.items() if asked]:
        why = "images of a streamed dataset are not inspected before training"
        raise UserError(f"--{given[0]}: {why}; leave it out, or train from a folder of images")


class ShardStream(Stream):
    """A ``Stream`` over ``Shards``, in the order of ``ShardOrder``.

    The first ``--num-holdout-images`` images of the first shards are held out. ``Sample.index`` counts images in the
    order of the shards' names. For the arguments see ``Stream``; ``cfg`` has the section Streaming too.
    """

    images: Shards  # type: ignore[assignment]
    order: ShardOrder

    def __init__(self, cfg: Data, shards: Shards, group: int, mode: str = "RGB", paired: Sequence[str] = ()) -> None:
        assert isinstance(cfg, Streaming)
        self._configure(cfg, group, mode)
        self.images = shards
        held = cfg.num_holdout_images
        if held >= len(shards):
            left = f"{cfg.dataset} has {len(shards)} images"
            raise UserError(f"--num-holdout-images {held} leaves nothing to train on: {left}")
        self.holdout_counts = (held - shards.starts[:-1]).clip(0, shards.counts)  # of each shard, its first
        self.order = ShardOrder(
            self.seed, shards.counts - self.holdout_counts, group, cfg.stream_lanes, cfg.shuffle_window
        )
        self.epoch_length = len(shards) - held
        self.paired = list(paired)
        self._read: tuple[int, list[Image.Image]] = (-1, [])

    def __getitem__(self, position: int) -> Sample:
        """The sample at ``position``. Raises: UserError for a bad image, unless ``--on-bad-image skip``."""
        place = self.order[position]
        shard, first, count = place.shard, int(self.holdout_counts[place.shard]), int(self.images.counts[place.shard])
        opened = self.images.get_open(shard, place.lane, place.live)
        for further in range(count - first):
            nth = first + (place.nth + further) % (count - first)
            try:
                record = opened.record(nth)
                images = self._images(record)
            except ValueError as error:
                self.reject(f"position {position}: {self.images.names[shard]}, image {nth}", error)
                continue
            index = int(self.images.starts[shard]) + nth
            self._read = (index, images)
            return self._augmented(self._sample(index, record), record.captions, position)
        raise UserError(f"{self.images.names[shard]}: none of its images can be used; remove it from the dataset")

    @cached_property
    def holdout(self) -> list[Sample]:  # type: ignore[override]
        """The held-out samples, without their pixels."""
        try:
            return [self._sample(index, self._record(index)) for index in range(self.cfg.num_holdout_images)]
        except ValueError as error:
            raise UserError(f"--num-holdout-images: the first images are held out, but {error}") from None

    def unaugmented(self, index: int) -> tuple[Sample, tuple[str, ...]]:
        """The sample of an image with centre crop and no flip, and its captions. Raises: ValueError for a bad image."""
        record = self._record(index)
        self._read = (index, self._images(record))
        return self._sample(index, record), record.captions

    def _record(self, index: int) -> Record:
        shard, nth = self.images.locate(index)
        record: Record = self.images.get_open(shard).record(nth)
        return record

    def _sample(self, index: int, record: Record) -> Sample:
        """Centre crop, no flip, first caption."""
        caption = without_separators(record.captions[0]) if record.captions else ""
        return Sample(index, record.name, *self.cfg.image_size, 0.5, 0.5, False, caption, 0)

    def _images(self, record: Record) -> list[Image.Image]:
        """The decoded image and its paired images; none if only its moments are stored.

        Raises: ValueError for a bad image.
        """
        if record.content is None:
            return []
        width, height = self.cfg.image_size
        image, *others = (self._decoded(record.name, content) for content in (record.content, *record.paired))
        for column, other in zip(self.paired, others, strict=True):
            if not same_shape(image.size, other.size):
                sizes = f"{other.width} x {other.height}, and the image {image.width} x {image.height}"
                raise ValueError(f"{record.name}: its {column} has another shape: {sizes}")
        if max(width / image.width, height / image.height) > 4:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"{record.name}: {size} is less than a quarter of {width} x {height}")
        return [image, *others]

    def _decoded(self, name: str, content: bytes) -> Image.Image:
        try:
            return decode(content, self.mode, self.cfg.first_frame, complete=True)
        except Exception as error:  # a broken file can raise any error in Pillow's decoders
            raise ValueError(f"{name}: {inspect_image(content).problem or error}") from None

    def reject(self, where: str, error: ValueError) -> None:
        """Report a bad image. Raises: UserError, unless ``--on-bad-image skip``."""
        if self.cfg.on_bad_image == "error":
            raise UserError(
                f"{where}: {error}; repair it, or show the next image instead with --on-bad-image skip --allow-change"
            ) from None
        echo(f"{where}: {error}; the next image is shown instead", err=True)

    def pixels(self, sample: Sample, paired: str | None = None) -> torch.Tensor:
        """float32 [C, height, width] in [-1, 1] of a sample, or of its paired image of column ``paired``."""
        if self._read[0] != sample.index:
            try:
                self._read = (sample.index, self._images(self._record(sample.index)))
            except ValueError as error:
                raise UserError(str(error)) from None
        image = self._read[1][1 + self.paired.index(paired) if paired else 0]
        return to_tensor(image, *sample.crop, self.cfg.image_interpolation_mode)

    def mask(self, sample: Sample) -> torch.Tensor:
        column = mask_column(self.cfg)
        assert column is not None
        self.pixels(sample, column)  # which reads the image and those that are paired with it
        image = self._read[1][1 + self.paired.index(column)].convert("L")
        return (to_tensor(image, *sample.crop, "box") + 1) / 2

    def image_size(self, sample: Sample) -> tuple[int, int]:
        """Width and height of the image file."""
        index, images = self._read
        if index != sample.index or not images:
            record = self._record(sample.index)
            if record.size is not None:
                return record.size
            images = self._images(record)
        return images[0].size

    def pixel_key(self, sample: Sample, paired: str | None = None) -> tuple[int, bool, int]:
        """The key of its moments, or of those of a paired image."""
        return sample.index, sample.flip, 1 + self.paired.index(paired) if paired else 0

    def examples(self, count: int) -> list[Sample]:
        """Some samples to show, without augmentation: the first images that can be used."""
        found: list[Sample] = []
        for index in range(len(self.images)):
            if len(found) == count or index >= PREVIEW_CAPTIONS:
                break
            with suppress(ValueError):
                found.append(self.unaugmented(index)[0])
        return found

    def texts(self) -> list[str]:
        """The captions of the first images."""
        found = {""}
        for index in range(min(PREVIEW_CAPTIONS, len(self.images))):
            with suppress(ValueError):
                found.update(self._record(index).captions)
        return sorted(found)

    def summary(self) -> list[str]:
        """Lines about the data that the user should read before training."""
        counts = self.images.counts
        more = f", {self.cfg.num_holdout_images} more held out" if self.cfg.num_holdout_images else ""
        steps = f"{self.epoch_length / self.group:.4g} steps of {self.group} images"
        return [
            f"images: {self.epoch_length}{more}, streamed; an epoch is {steps}",
            f"shards: {len(counts)}, of {counts.min()} to {counts.max()} images; lanes: {self.order.lanes}, "
            f"each shuffled {self.order.window} at a time",
            *self.images.notes,
            "sizes, copies and lengths of captions are not checked; a bad image is reported when it is read",
        ]
