"""The training items of the pixel models: position in the run -> pixels, class and noise.

Everything random of position ``p`` is drawn here from ``(seed, purpose, p)``, as in ``text_to_image``.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.data import MODES, Images, Row, Sample, Shards, ShardStream, Stream, summarize
from sdtune.data.denoising_dataset import DenoisingDataset, Position
from sdtune.run import rng


class PixelConfig(Protocol):
    """The options of pixel models that are read here."""

    dataset: str
    channels: int | None

    @property
    def model(self) -> str | None: ...

    @property
    def class_column(self) -> str | None: ...


class PixelDataset(DenoisingDataset):
    """Images without captions.

    Args:
        classes: names of the classes in label order; empty if there are none.
        class_dropout: share of images whose label is the null class, ``len(classes)``.
    """

    def __init__(self, stream: Stream, classes: Sequence[str] = (), class_dropout: float = 0.0):
        super().__init__(stream)
        self.classes, self.class_dropout = list(classes), class_dropout
        self.numbers = {name: number for number, name in enumerate(classes)}

    @property
    def prompts(self) -> list[str]:
        """The prompts of the sample grids: one class after another."""
        return self.classes or [""]

    def make_item(self, sample: Sample, u: Tensor, position: Position) -> dict[str, Any]:
        pixels = self.stream.pixels(sample)
        item: dict[str, Any] = {
            "name": sample.name,
            "u": u,
            "pixels": pixels,
            **self.draw_noise(position, *pixels.shape),
        }
        if self.classes:
            item["label"] = self.label(sample, position)
        return item

    def label(self, sample: Sample, position: Position) -> int:
        """The number of the image's class. A held-out image always has its own, never the null class."""
        if self.class_dropout and isinstance(position, int):
            chance = torch.rand((), generator=rng.generator(self.seed, "class dropout", position))
            if chance < self.class_dropout:
                return len(self.classes)
        label = self.stream.images.rows[sample.index].label
        assert label is not None
        return self.numbers[label]


def pixel_dataset(
    cfg: PixelConfig,
    stream: Stream,
    log: Callable[[str], None],
    classes: Sequence[str] = (),
    class_dropout: float = 0.0,
) -> PixelDataset:
    """The dataset of a method without captions; ``log`` gets each line that the user should read."""
    for line in stream.summary() if isinstance(stream, ShardStream) else summarize(stream):
        log(line)
    for loss, result in (("colour", "turned grey"), ("transparency", "put on white")):
        if count := sum(loss in lost_channels(row, stream.mode) for row in stream.images.rows):
            log(f"images {result} for --channels {cfg.channels}: {count}")
    if classes:
        counts = [sum(stream.images.rows[i].label == name for i in stream.indices) for name in classes]
        log(f"classes: {len(classes)}, of {min(counts)} to {max(counts)} images")
    return PixelDataset(stream, classes, class_dropout)


# ---- channels and classes of the images and of the model


def lost_channels(row: Row, mode: str) -> list[str]:
    """What an image loses when it is converted to ``mode``: colour, transparency, both or nothing."""
    colour = row.mode.startswith("RGB") and not mode.startswith("RGB")
    transparency = row.mode.endswith("A") and not mode.endswith("A")
    return ["colour"] * colour + ["transparency"] * transparency


def choose_mode(cfg: PixelConfig, images: Images | Shards, held: int | None) -> str:
    """The Pillow mode to which all images are converted: that of ``--channels``, else one that loses nothing.

    Args:
        held: channels of the model that is continued, or described by a file; ``None`` if it may have any.

    Raises:
        UserError: the model has too few channels for the images, or another number than ``--channels``.
    """
    if held is not None and held not in MODES:
        raise UserError(f"the model has {held} channels; images have 1 to {max(MODES)}")
    if cfg.channels and held not in (None, cfg.channels):
        raise UserError(f"--channels {cfg.channels}: the model has {held}; leave it out, or start from scratch")
    if cfg.channels:
        return MODES[cfg.channels]
    if isinstance(images, Shards):
        return MODES[held or 3]  # the images of shards are not known yet
    if held is None:
        colour, alpha = (any(row.mode.count(part) for row in images.rows) for part in ("RGB", "A"))
        return MODES[(3 if colour else 1) + alpha]
    mode = MODES[held]
    for loss, effect in (("colour", "turns them grey"), ("transparency", "puts them on white")):
        if names := [row.name for row in images.rows if loss in lost_channels(row, mode)]:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(
                f"{cfg.dataset}: {len(names)} of {len(images.rows)} images have {loss} ({some}), "
                f"which a model of {held} channel{'s' * (held > 1)} cannot hold; --channels {held} {effect}"
            )
    return mode


def class_names(cfg: PixelConfig, images: Images | Shards, held: Sequence[str] | None = None) -> list[str]:
    """The classes of the images by ``--class-column``, in label order; empty without that option.

    Args:
        held: classes of the model that is continued, in its label order; ``None`` for a new model.

    Raises:
        UserError: there is only one class, or one that the model does not have.
    """
    asked = f"--class-column {cfg.class_column}"
    if held is None:
        if cfg.class_column and len(images.classes) < 2:
            raise UserError(f"{asked}: all images of {cfg.dataset} have one class, {images.classes[0]}")
        return list(images.classes)
    if held and not cfg.class_column:
        raise UserError(
            f"--model {cfg.model}: the model has classes ({len(held)}); name those of the images with --class-column"
        )
    if cfg.class_column and not held:
        raise UserError(f"{asked}: --model {cfg.model} has no classes; leave one of the two options out")
    if strange := [name for name in images.classes if name not in held]:
        raise UserError(
            f"{asked}: {', '.join(strange[:3])} is not a class of --model {cfg.model}; it has {', '.join(held)}"
        )
    return list(held)
