"""The plan of a run in one line, printed before training, and what the license of its base forbids."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from sdtune.config.sections import WARMED, LrSchedule, UserError, finds_rate
from sdtune.run import base_license


class Planned(Protocol):
    """The options that a plan states, of the sections Data, Optim and Run."""

    repeats: int
    buckets: bool
    scale_lr: bool
    optimizer: str
    lr_scheduler: LrSchedule
    lr_warmup_steps: int
    train_batch_size: int
    gradient_accumulation_steps: int


def steps_of(cfg: Any, stream: Any) -> int:
    """Optimizer steps of a run.

    Raises:
        UserError: its warm-up is longer, so that the learning rate that was asked for is never reached.
    """
    total = cfg.max_steps
    if cfg.num_train_epochs:
        total = math.ceil(cfg.num_train_epochs * int(stream.epoch_length) / int(stream.group))
    default = type(cfg).model_fields["lr_warmup_steps"].default
    if warms_up(cfg) and default != cfg.lr_warmup_steps >= total:
        raise UserError(
            f"--lr-warmup-steps {cfg.lr_warmup_steps}: the run has {total:,} steps and would end before the learning "
            "rate reaches its peak; give fewer"
        )
    return total


def warms_up(cfg: Planned) -> bool:
    """Whether the learning rate rises first."""
    return cfg.lr_warmup_steps > 0 and cfg.lr_scheduler in WARMED


def plan(cfg: Planned, stream: Any, total: int, world: int, peaks: Sequence[float], trained: int, workers: int) -> str:
    """The plan of a run.

    Args:
        total: optimizer steps.
        world: processes.
        peaks: the peak learning rate of each group of parameters, as the config has it.
        trained: parameters that train.
        workers: processes that read the images, beside each process that trains.
    """
    parts, subjects, repeats, group = len(stream.images.sizes), stream.images.subjects, cfg.repeats, stream.group
    images = stream.epoch_length // (repeats * parts)
    epoch = f"{images:,} images x {repeats} repeats{', as many of the class' if parts > subjects else ''}"
    share = ""
    if subjects > 1:
        epoch += f", for each of {subjects} concepts"
        share = f", in turn of {subjects} concepts{' and of their classes' if parts > subjects else ''}"
    elif parts > 1:
        even = f", {group // 2} of the subject and {group - group // 2} of its class"
        share = even if group % 2 == 0 else ", in turn of the subject and of its class"
    if cfg.buckets:
        epoch += f", in {len(stream.buckets)} bucket{'s' * (len(stream.buckets) != 1)}"
    rates = [short(rate) for rate in dict.fromkeys(peaks)]
    if cfg.scale_lr:
        rates = [f"{short(rate)} x {group} = {short(rate * group)}" for rate in dict.fromkeys(peaks)]
    rate = f"learning rate {', '.join(rates)}"
    if finds_rate(cfg.optimizer) and set(peaks) != {1.0}:
        rate += f" ({cfg.optimizer} finds the rate itself and multiplies it by this: 1 is usual)"
    if warms_up(cfg) and cfg.lr_warmup_steps >= total:
        rate += f" (not reached: its warm-up of {cfg.lr_warmup_steps} steps is longer than the run)"
    line = "; ".join(
        [
            f"plan: {epoch} = {stream.epoch_length:,} an epoch",
            f"{cfg.train_batch_size} a process x {cfg.gradient_accumulation_steps} accumulated x {world} processes = "
            f"{group} a step{share}",
            f"{total:,} steps = {total * group:,} samples, {total * group / stream.epoch_length:.1f} epochs",
            rate,
            f"images are read by {workers} process{'es' * (workers > 1)}"
            if workers
            else "images are read in the training process",
            f"{trained:,} parameters train",
        ]
    )
    return "\n".join(filter(None, [line, base_license.notice(cfg)]))


def short(number: float) -> str:
    """A number as people write it: 0.05, 8e-4."""
    if number >= 0.01:
        return f"{number:g}"
    mantissa, exponent = f"{number:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
