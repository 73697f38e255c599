"""What changes during a run, saved and restored as one: weights, moved modules, optimizer, average, scaler, step.

Everything else (learning rate, data order, noise, dropout) is a function of the step, so it needs no saving.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sdtune.config.sections import RunFailed, UserError
from sdtune.diffusion.moving_average import own_slice
from sdtune.recipes.recipe import Recipe, TrainingConfig
from sdtune.run import checkpoints
from sdtune.run.barrier import store_barrier
from sdtune.run.environment import environment
from sdtune.training import optim
from sdtune.training.engine import Engine

FP16_MAX = 65504.0


class State:
    """The weights that a recipe trains, with their optimizer, their average and the step.

    Args:
        identity: facts that a continued run must share: images per step, fingerprint of the data, steps of a phase.
        total: steps that the run is to have.

    Raises:
        TypeError: a trained or moved parameter is not fp32; its updates would round to nothing.
    """

    def __init__(
        self,
        cfg: TrainingConfig,
        recipe: Recipe,
        engine: Engine,
        accelerator: Accelerator,
        identity: dict[str, Any],
        total: int,
    ):
        self.cfg, self.engine, self.accelerator, self.identity = cfg, engine, accelerator, identity
        self.root = cfg.output_dir / "checkpoints"
        self.weights: dict[str, Tensor] = {n: p for n, p in recipe.named_parameters() if p.requires_grad}
        self.moved = recipe.moved_weights()
        if wrong := [name for name, p in (self.weights | self.moved).items() if p.dtype != torch.float32]:
            raise TypeError(f"trained and moved parameters must be float32: {', '.join(wrong[:3])} are not")
        self.optimizer = optim.make_optimizer(cfg, recipe.parameter_groups())
        self.names = {p: name for name, p in self.weights.items()}
        self.average = optim.Average(cfg, self.weights) if cfg.use_ema else None
        self.step, self.skipped = 0, 0
        self.total = self.planned = total
        if accelerator.is_main_process:
            copies = 4 if self.average else 3  # the weights, their two moments, their average
            size = copies * size_of(self.weights) + size_of(self.moved)
            checkpoints.require_room(self.root, size, cfg.checkpoints_total_limit)

    def evaluating(self) -> Any:
        """Context in which the model holds the weights to sample and export: the average, if the run keeps one."""
        return self.average.in_place() if self.average else optim.evaluation(self.optimizer)

    @contextmanager
    def export_weights(self) -> Iterator[Recipe]:
        """Context in which the first process has a recipe with all weights, for export. Every process must enter it."""
        with self.evaluating():
            yield self.engine.gather_recipe()

    def save(self) -> None:
        """Called by every process; the first one writes full tensors, which any number of processes can read.

        It may take longer than the others would wait in a collective; see `barrier.store_barrier`.

        Raises:
            RunFailed: training has diverged; see `check_weights`.
        """
        self.check_weights()
        moments, numbers = self.engine.save_optimizer(self.optimizer, self.names)
        tensors = {"weights": self.gather_tensors(self.weights), "optimizer": self.gather_tensors(moments)}
        if self.average:
            tensors["average"] = self.gather_tensors(self.average.mean)
        if self.moved:
            tensors["moved"] = self.gather_tensors(self.moved)
        if self.accelerator.is_main_process:
            facts = self.identity | {
                "step": self.step,
                "skipped": self.skipped,
                "total": self.total,
                "optimizer": numbers,
                "scaler": self.engine.save_scale() or None,
                "versions": environment(),
            }
            checkpoints.save(self.root, self.step, tensors, facts, self.cfg.checkpoints_total_limit)
        store_barrier()

    @torch.no_grad()
    def check_weights(self) -> None:
        """Refuse to save or export weights beyond the range of fp16, in which others would load them.

        Raises:
            RunFailed: on every process.
        """
        parts = [own_slice(w) for w in self.weights.values()]
        largest = torch.stack([part.abs().max() for part in parts if part.numel()]).max()
        beyond = (~(largest <= FP16_MAX)).float()  # also where it is NaN
        if self.accelerator.reduce(beyond, "sum") > 0:
            raise RunFailed(
                f"step {self.step}: the weights have grown to {largest.item():.3g}: training has diverged, and "
                "nothing was saved; earlier checkpoints are complete. Lower --learning-rate or --max-grad-norm"
            )

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors in main memory on the first process, nothing on the others. Every process must call this.

        One at a time is whole on the device, where those of a large model would not fit together.
        """
        kept = {}
        for name, tensor in tensors.items():
            full = self.engine.weight(tensor)
            if self.accelerator.is_main_process:
                kept[name] = full.cpu()
            del full  # before the next one is gathered
        return kept

    @torch.no_grad()
    def restore(self, allow_change: bool, log: Callable[[str], None]) -> None:
        """Continue from the newest whole checkpoint, if there is one.

        Raises:
            UserError: the checkpoint belongs to another batch, other data, other phases or other weights.
        """
        folder: Path | None = checkpoints.latest(self.root, log)
        if folder is None:
            return
        tensors, saved = checkpoints.load(folder)
        if self.identity["group"] != saved["group"]:
            raise UserError(
                f"a step of this run is {saved['group']} images (batch x accumulation x processes), not "
                f"{self.identity['group']}; cut them otherwise, but keep the product"
            )
        if self.identity["data"] != saved["data"] and not allow_change:
            raise UserError("the images or captions changed since this run began; --allow-change goes on all the same")
        if (phase := saved.get("phase_steps")) != self.identity["phase_steps"]:
            raise UserError(
                f"a phase of this run is {phase} steps, and would now be {self.identity['phase_steps']}, which changes "
                f"what was learnt when; --phase-steps {phase} keeps the phases whatever the length of the run"
            )
        if tensors["weights"].keys() != self.weights.keys() or tensors.get("moved", {}).keys() != self.moved.keys():
            raise UserError(f"{folder} holds other weights than this run trains; --overwrite starts anew")
        for name, w in self.weights.items():
            self.engine.set_weight(w, tensors["weights"][name])
        for name, w in self.moved.items():
            self.engine.set_weight(w, tensors["moved"][name])
        self.engine.load_optimizer(self.optimizer, self.names, tensors.get("optimizer", {}), saved["optimizer"])
        if self.average:
            for name, w in self.average.mean.items():
                self.engine.set_weight(w, tensors["average"][name])
        if self.engine.overflows and saved["scaler"]:
            self.engine.load_scale(saved["scaler"])
        self.step, self.skipped = saved["step"], saved["skipped"]
        self.planned = saved.get("total", self.total)
        log(f"continuing at step {self.step}, from {folder}")


def size_of(weights: Mapping[str, Tensor]) -> int:
    """Bytes of full tensors, of which each process may hold a slice."""
    return sum(w.numel() * w.element_size() for w in weights.values())
