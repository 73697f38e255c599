"""A micro-step as one function of tensors in fixed places, which a GPU records once and repeats (``--cuda-graphs``).

A small step is bound by the host: it hands thousands of kernels to the GPU, one by one. Recorded, they are handed over
together. What is recorded reads a batch from the same places each time and adds to gradients that stay where they are;
everything that changes on the host (seed, learning rate, step) is outside of it. There is a recording for each shape of
a batch.

On a CPU nothing is recorded, and the function is called again each time: so its bits can be compared.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sdtune.config.sections import Run, UserError
from sdtune.recipes.recipe import Recipe
from sdtune.training.engine import Engine, nan_unless_finite

DEVICES = {"cuda"}
"""Types of devices on which steps are repeated."""
WARM_UPS = 3
"""Passes before a recording, in which libraries choose their kernels and make what they keep."""


class MicroStep:
    """The forward and backward pass of an engine on tensors like those of ``batch``.

    Args:
        batch: on the device of the run; its tensors are copied.
    """

    def __init__(self, engine: Engine, batch: Mapping[str, Tensor]):
        self.engine = engine
        self.places = {name: x.clone() for name, x in batch.items()}
        self.loss: Tensor = torch.empty(0)
        self.figures: dict[str, Tensor] = {}
        self.repeat: Callable[[], None] = self.run

    def run(self) -> None:
        """Read the places; add to the gradients; leave loss and figures."""
        loss, figures = self.engine(dict(self.places))
        self.engine.backward(nan_unless_finite(loss.mean()))
        self.loss, self.figures = loss.detach(), {name: x.detach() for name, x in figures.items()}

    def record(self) -> None:
        """Record `run` on the GPU; the gradients stay as they are.

        Raises:
            UserError: the step does something that cannot be recorded, such as reading a value back.
        """
        kept = [w.grad.clone() for w in self.engine.trained if w.grad is not None]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([self.engine.device]):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.run()
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                raise UserError(f"--cuda-graphs: this step cannot be recorded ({why}); leave it out") from error
        torch._foreach_copy_([w.grad for w in self.engine.trained if w.grad is not None], kept)
        self.repeat = graph.replay

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and figures of a batch, whose gradient is added to those that are there."""
        torch._foreach_copy_(list(self.places.values()), [batch[name] for name in self.places])
        self.repeat()
        return self.loss.clone(), {name: x.clone() for name, x in self.figures.items()}


class RepeatedSteps:
    """The micro-steps of a run, one for each shape of a batch.

    Raises:
        UserError: the run cannot repeat its steps.
    """

    def __init__(self, engine: Engine, recipe: Recipe, cfg: Run):
        if engine.device.type not in DEVICES:
            raise UserError("--cuda-graphs: needs a GPU; leave it out")
        if engine.world > 1:
            raise UserError("--cuda-graphs: is for one process; leave it out")
        parts_end = any(group.get("stop_fraction", 1.0) < 1 for group in recipe.parameter_groups())
        if not recipe.repeats or parts_end:
            raise UserError(f"--cuda-graphs: the steps of {cfg.method} change during the run; leave it out")
        self.engine = engine
        self.steps: dict[tuple[Any, ...], MicroStep] = {}
        engine.keep_gradients()

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """As the engine's forward pass; the backward pass is done."""
        if words := [name for name, x in batch.items() if not isinstance(x, Tensor)]:
            raise UserError(f"--cuda-graphs: a step encodes each {words[0]} anew; train with --cache, or leave it out")
        key = tuple((name, x.shape, x.dtype) for name, x in batch.items())
        if key not in self.steps:
            self.steps[key] = MicroStep(self.engine, batch)
            if self.engine.device.type == "cuda":
                self.steps[key].record()
        return self.steps[key](batch)
