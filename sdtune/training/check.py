"""`sdtune check`: what is wrong with a run, and what it will cost, without training."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sdtune.config.sections import Model, Run, UserError
from sdtune.config.untrusted import echo
from sdtune.models import families
from sdtune.recipes.recipe import Recipe, TrainingConfig
from sdtune.run import folder
from sdtune.run.device import best_device
from sdtune.run.metrics import check_trackers
from sdtune.run.plan import plan, steps_of
from sdtune.run.precision import precision_of
from sdtune.training import optim
from sdtune.training.batch_size import Estimates, fitting_changes, flags, human_bytes, largest_batch, limit_of
from sdtune.training.memory_estimate import MemoryEstimate, meta_recipe
from sdtune.training.preview_memory import size_of


def check(
    kind: type[Recipe],
    cfg: TrainingConfig,
    num_processes: int | None = None,
    memory: str | None = None,
    find_batch_size: bool = False,
) -> None:
    """Print what a run shows, does and needs.

    Raises:
        UserError: all that is wrong with it, a line each.
    """
    device, world = best_device(mps=False), num_processes or 1
    problems = Problems()
    limit = problems.collect(lambda: limit_of(memory, device))
    problems.collect(lambda: check_trackers(cfg.report_to))
    problems.collect(lambda: precision_of(cfg))
    problems.collect(lambda: optim.lr_schedule(cfg, 1))
    problems.collect(lambda: optim.make_optimizer(cfg, [{"params": [torch.nn.Parameter(torch.zeros(1))]}]))
    problems.collect(lambda: same_run(cfg))
    images = cfg.train_batch_size * cfg.gradient_accumulation_steps * world
    made = problems.collect(lambda: meta_recipe(kind, cfg, images, echo))
    if made is None and isinstance(cfg, Model):  # the images are looked at first, so the base may not have been
        problems.collect(lambda: families.load(cfg, torch.device("meta"), torch.float32))
    problems.report()
    recipe, dataset = made
    trained = [p for p in recipe.parameters() if p.requires_grad]
    peaks = [group["lr"] for group in recipe.parameter_groups()]
    total = steps_of(cfg, dataset.stream)
    workers = cfg.loader_workers(dataset.reads_images)
    echo(plan(cfg, dataset.stream, total, world, peaks, sum(p.numel() for p in trained), workers))
    saved = size_of([*trained, *recipe.moved_weights().values()])
    estimates = Estimates(kind, cfg, device, world, made)
    try:
        need = problems.collect(estimates.of)
        problems.report()
        echo(disk_line(cfg, need, saved, problems))
        for line in memory_lines(need, device):
            echo(line)
        if find_batch_size:
            problems.collect(lambda: largest_batch(kind, cfg, world, memory))
        elif need.total > limit:
            problems.lines.append(too_much(cfg, estimates, limit, device))
    except RuntimeError as error:
        echo(f"memory: this recipe cannot be traced ({str(error).splitlines()[0]}), so no figure")
    problems.report()


def same_run(cfg: Run) -> None:
    """Raises: UserError when the run's folder holds another run."""
    folder.refuse_foreign(cfg.output_dir)
    written = cfg.output_dir / "config.yaml"
    if written.exists() and (changed := folder.differences(cfg, written)):
        raise UserError(
            f"--output-dir {cfg.output_dir}: holds a run with another config ({'; '.join(changed)}); name another "
            "folder, start anew with --overwrite, or continue with --allow-change"
        )


def disk_line(cfg: Run, need: MemoryEstimate, weights: int, problems: "Problems") -> str:
    """What the checkpoints take; a disk too small for them is a problem."""
    one, most = weights + need.optimizer + need.average, cfg.checkpoints_total_limit + 1
    place = next(p for p in (cfg.output_dir.absolute(), *cfg.output_dir.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if one * most > free:
        problems.lines.append(
            f"--output-dir {cfg.output_dir}: its checkpoints need {human_bytes(one * most)}, "
            f"{human_bytes(free)} are free; make room or name a folder on another disk"
        )
    return (
        f"disk: {human_bytes(one)} a checkpoint, up to {most} at a time, {human_bytes(one * most)}; "
        f"{human_bytes(free)} free"
    )


def memory_lines(need: MemoryEstimate, device: torch.device) -> Iterator[str]:
    """The estimate and what it is made of, the largest first."""
    total = human_bytes(need.total)
    yield f"memory: {total} at the worst moment of a step, on each process ({device.type}; an estimate)"
    for name, size in sorted(need._asdict().items(), key=lambda item: -item[1]):
        if size:
            yield f"  {human_bytes(size):>10}  {MEANING[name]}"


MEANING = {
    "base": "the process itself, without a model",
    "weights": "weights, trained and frozen",
    "optimizer": "state of the optimizer",
    "average": "moving average of the weights",
    "gradients": "gradients",
    "activations": "activations, and the batch",
    "temporary": "temporary, in the backward pass",
    "preview": "more than a step takes, while a sample image is decoded",
    "reading": "more than a step takes, while the base is read in 32 bits",
}
"""Fields of a MemoryEstimate in words."""


def too_much(cfg: Run, estimates: Estimates, limit: int, device: torch.device) -> str:
    """The message for a run that does not fit: each change that makes it fit, with the memory that it then needs."""
    there = f"{human_bytes(estimates.of().total)} are needed at once, and {human_bytes(limit)} are there"
    found = list(fitting_changes(estimates, limit))
    fits = [f"{flags(changed)}: {human_bytes(need.total)}" for changed, need in found if need.total <= limit]
    if fits:
        return "\n       ".join([f"--memory: {there}; it fits with", *fits])
    changed, need = found[-1]
    all_of_it = human_bytes(need.total)
    return f"--memory: {there}; {flags(changed) or 'nothing'} would make it {all_of_it}, and nothing makes it fit"


class Problems:
    """Collects what is wrong with a run, each thing once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def collect(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, or ``None`` after a `UserError`, which is remembered."""
        try:
            return work()
        except UserError as error:
            if str(error) not in self.lines:
                self.lines.append(str(error))
            return None

    def report(self) -> None:
        """Raises: UserError with all remembered lines, if there are any."""
        if self.lines:
            raise UserError("\n       ".join(self.lines))
