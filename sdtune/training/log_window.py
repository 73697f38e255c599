"""Losses and skipped steps since the last line of metrics, held on the device until that line is written.

Reading a number off a GPU makes the host wait for it. So losses stay tensors, and whether a step was skipped is
counted from norms that stay there too; ``line`` is the one place that waits.
"""

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sdtune.config.sections import RunFailed
from sdtune.config.untrusted import echo


class Figures:
    """Means of figures over images, computed on the device; an image counts where its figure is not NaN."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Figures of some images, ``[B]`` each, by name."""
        for name, values in figures.items():
            values = values.detach().float()
            known = torch.stack([values.nansum(), (~values.isnan()).sum()])
            self.sums[name] = self.sums[name] + known if name in self.sums else known

    def means(self) -> dict[str, float]:
        """Over all processes, of which some may have had no image; NaN for a figure that no image has."""
        sums: dict[str, list[float]] = {}
        for part in gather_object([{name: known.tolist() for name, known in self.sums.items()}]):
            for name, (total, count) in part.items():
                before = sums.setdefault(name, [0.0, 0.0])
                sums[name] = [before[0] + total, before[1] + count]
        return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


class Window:
    """Losses and skipped steps since the last line.

    Args:
        skipped: steps skipped earlier in the run.
        step: steps of the run so far.
    """

    def __init__(self, accelerator: Accelerator, skipped: int, step: int):
        self.accelerator, self.skipped = accelerator, skipped
        self.device = accelerator.device
        self.in_a_row = skipped if skipped == step else 0
        self.clear()

    def clear(self) -> None:
        self.losses: list[tuple[Tensor, list[str]]] = []
        self.figures = Figures()
        self.norms: list[Tensor] = []

    def add(self, loss: Tensor, figures: Mapping[str, Tensor], samples: list[str]) -> None:
        """The losses and figures of a micro-batch, and the names of its images."""
        self.losses.append((loss.detach(), samples))
        self.figures.add(figures)

    def end_step(self, norm: Tensor) -> None:
        """A step whose gradient had this norm."""
        self.norms.append(norm)

    def skipped_so_far(self) -> int:
        """Steps skipped in the run; waits for the device."""
        return self.skipped + sum(self._bad())

    @property
    def steps(self) -> int:
        """Steps since the last line."""
        return len(self.norms)

    def _bad(self) -> list[bool]:
        """Of each step since the last line, whether it was skipped; waits for the device."""
        return (~torch.stack(self.norms).isfinite()).tolist() if self.norms else []

    def line(self, step: int, norm: Tensor, learning_rate: float, limit: int) -> dict[str, float]:
        """The numbers of the steps since the last line, over all processes.

        Raises:
            RunFailed: ``limit`` steps in a row, up to this one, had no finite gradient.
        """
        bad = self._bad()
        skipped = self.skipped + sum(bad)
        in_a_row = self.in_a_row + len(bad) if all(bad) else bad[::-1].index(False)
        finite = [loss.float().mean() for loss, _ in self.losses if loss.isfinite().all()]
        if skipped > self.skipped:
            self._name_culprits(step, skipped - self.skipped)
        if in_a_row >= limit:
            raise RunFailed(
                f"step {step}: no finite gradient for {in_a_row} steps in a row, so nothing was saved after them. "
                f"Lower --learning-rate (now {learning_rate:g}), train in bf16 or fp32, or check the base for NaN"
            )
        total = torch.stack(finite).sum().item() if finite else 0.0
        sums = torch.tensor([total, len(finite)], device=self.device)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        self.skipped, self.in_a_row = skipped, in_a_row
        values = {
            "loss": total / count if count else math.nan,
            "learning_rate": learning_rate,
            "grad_norm": norm.item(),
            "skipped_steps": skipped,
            **self.figures.means(),
        }
        self.clear()
        return values

    def _name_culprits(self, step: int, skipped: int) -> None:
        names = sorted({n for loss, samples in self.losses if not loss.isfinite().all() for n in samples})
        named = f"; no finite loss in batches with {', '.join(names[:8])}" if names else ""
        echo(f"step {step}: {skipped} of the last {self.steps} steps had no finite gradient and were skipped{named}")
