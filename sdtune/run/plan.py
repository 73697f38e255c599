"""The plan of a run in one line, printed before training."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from sdtune.config.sections import Run


class Planned(Protocol):
    """The options that a plan states, of the sections Data, Optim and Run."""

    repeats: int
    buckets: bool
    scale_lr: bool
    train_batch_size: int
    gradient_accumulation_steps: int


def steps_of(cfg: Run, stream: Any) -> int:
    """Optimizer steps of a run."""
    if not cfg.num_train_epochs:
        return cfg.max_steps
    return math.ceil(cfg.num_train_epochs * int(stream.epoch_length) / int(stream.group))


def plan(cfg: Planned, stream: Any, total: int, world: int, peaks: Sequence[float], trained: int) -> str:
    """The plan of a run.

    Args:
        total: optimizer steps.
        world: processes.
        peaks: the peak learning rate of each group of parameters, as the config has it.
        trained: parameters that train.
    """
    parts, repeats, group = len(stream.images.sizes), cfg.repeats, stream.group
    images = stream.epoch_length // (repeats * parts)
    epoch = f"{images:,} images x {repeats} repeats{', as many of the class' if parts > 1 else ''}"
    if cfg.buckets:
        epoch += f", in {len(stream.buckets)} bucket{'s' * (len(stream.buckets) != 1)}"
    rates = [short(rate) for rate in dict.fromkeys(peaks)]
    if cfg.scale_lr:
        rates = [f"{short(rate)} x {group} = {short(rate * group)}" for rate in dict.fromkeys(peaks)]
    return "; ".join(
        [
            f"plan: {epoch} = {stream.epoch_length:,} an epoch",
            f"{cfg.train_batch_size} a process x {cfg.gradient_accumulation_steps} accumulated x {world} processes = "
            f"{group} a step",
            f"{total:,} steps = {total * group:,} samples, {total * group / stream.epoch_length:.1f} epochs",
            f"learning rate {', '.join(rates)}",
            f"{trained:,} parameters train",
        ]
    )


def short(number: float) -> str:
    """A number as people write it: 0.05, 8e-4."""
    if number >= 0.01:
        return f"{number:g}"
    mantissa, exponent = f"{number:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
