"""What an image without a caption is to a recipe: position in the run -> pixels and class, with noise of its own.

Everything random about sample ``p`` is drawn here from ``(seed, purpose, p)``, as in ``samples``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.data import MODES, Images, Row, Sample, Shards, Stream, Streamed, report
from sdtune.data.noised import Noised
from sdtune.run import rng


class Pixels(Noised):
    """Images by position, or by ``("holdout", k)``.

    Args:
        cfg: a config with the section Data.
        classes: names of the classes in label order; empty for none.
        class_dropout: share of images whose label is the null class, ``len(classes)``.
    """

    def __init__(self, cfg: Any, stream: Stream, classes: Sequence[str] = (), class_dropout: float = 0.0):
        super().__init__(cfg, stream)
        self.classes, self.class_dropout = list(classes), class_dropout
        self.numbers = {name: number for number, name in enumerate(classes)}

    @property
    def prompts(self) -> list[str]:
        """What the sample grids show: every class in turn."""
        return self.classes or [""]

    def tensors(self, sample: Sample, u: Tensor, position: Any) -> dict[str, Any]:
        pixels = self.stream.pixels(sample)
        item = {"name": sample.name, "u": u, "pixels": pixels, **self.noise(position, *pixels.shape)}
        if self.classes:
            item["label"] = self.label(sample, position)
        return item

    def label(self, sample: Sample, position: Any) -> int:
        """The number of the image's class; of a held-out image always its own, never the null class."""
        if self.class_dropout and isinstance(position, int):
            chance = torch.rand((), generator=rng.generator(self.cfg.seed, "class dropout", position))
            if chance < self.class_dropout:
                return len(self.classes)
        return self.numbers[self.stream.images.rows[sample.index].label]


def pixels(
    cfg: Any,
    stream: Stream,
    log: Callable[[str], None],
    classes: Sequence[str] = (),
    class_dropout: float = 0.0,
) -> Pixels:
    """The dataset of a recipe without captions; what a person should know of it is said."""
    for line in stream.told() if isinstance(stream, Streamed) else report(stream):
        log(line)
    for loss, deed in (("colour", "turned grey"), ("transparency", "laid on white")):
        if count := sum(loss in lost(row, stream.mode) for row in stream.images.rows):
            log(f"images {deed} for --channels {cfg.channels}: {count}")
    if classes:
        counts = [sum(stream.images.rows[i].label == name for i in stream.indices) for name in classes]
        log(f"classes: {len(classes)}, of {min(counts)} to {max(counts)} images")
    return Pixels(cfg, stream, classes, class_dropout)


# ---- what images have, and what a model takes ----------------------------------------------------------


def lost(row: Row, mode: str) -> list[str]:
    """What an image has that pixels of ``mode`` do not."""
    colour = row.mode.startswith("RGB") and not mode.startswith("RGB")
    transparency = row.mode.endswith("A") and not mode.endswith("A")
    return ["colour"] * colour + ["transparency"] * transparency


def mode_for(cfg: Any, images: Images | Shards, held: int | None) -> str:
    """The Pillow mode that every image becomes: as ``--channels`` asks, else what loses nothing.

    Args:
        held: channels of the model that is continued, or described by a file; ``None`` when it may have any.

    Raises:
        UserError: the model cannot hold what the images have, or has another number of channels than was asked.
    """
    if held is not None and held not in MODES:
        raise UserError(f"the model has {held} channels; images have 1 to {max(MODES)}")
    if cfg.channels and held not in (None, cfg.channels):
        raise UserError(f"--channels {cfg.channels}: the model has {held}; leave it out, or start from scratch")
    if cfg.channels:
        return MODES[cfg.channels]
    if isinstance(images, Shards):
        return MODES[held or 3]  # their images are not known yet
    if held is None:
        colour, alpha = (any(row.mode.count(part) for row in images.rows) for part in ("RGB", "A"))
        return MODES[(3 if colour else 1) + alpha]
    mode = MODES[held]
    for loss, cure in (("colour", "turns them grey"), ("transparency", "lays them on white")):
        if names := [row.name for row in images.rows if loss in lost(row, mode)]:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(
                f"{cfg.dataset}: {len(names)} of {len(images.rows)} images have {loss} ({some}), "
                f"which a model of {held} channel{'s' * (held > 1)} cannot hold; --channels {held} {cure}"
            )
    return mode


def classes_of(cfg: Any, images: Images | Shards, held: Sequence[str] | None = None) -> list[str]:
    """The classes that ``--class-column`` names, in label order; empty without it.

    Args:
        held: classes of the model that is continued, whose order they keep; ``None`` from scratch.

    Raises:
        UserError: there is only one, or the model knows others.
    """
    asked = f"--class-column {cfg.class_column}"
    if held is None:
        if cfg.class_column and len(images.classes) < 2:
            raise UserError(f"{asked}: all images of {cfg.dataset} have one class, {images.classes[0]}")
        return list(images.classes)
    if held and not cfg.class_column:
        raise UserError(
            f"--model {cfg.model}: has {len(held)} classes; say with --class-column where those of the images are"
        )
    if cfg.class_column and not held:
        raise UserError(f"{asked}: --model {cfg.model} has no classes; leave one of them out")
    if strange := [name for name in images.classes if name not in held]:
        raise UserError(
            f"{asked}: {', '.join(strange[:3])} is no class of --model {cfg.model}; it has {', '.join(held)}"
        )
    return list(held)
