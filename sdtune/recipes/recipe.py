"""The interface that a training method implements."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from PIL.Image import Image
from torch import Tensor, device, nn

from sdtune.config.sections import Data, Hub, Optim, Preview, Run


class TrainingConfig(Data, Optim, Preview, Hub, Run):
    """The sections that the training loop reads, for the type checker.

    The config of a method does not derive from it: it lists its sections itself, in the order of its help.
    """


class RecipeDataset(Protocol):
    """Position in the run to a dict of tensors and a ``name``, as the loop uses it."""

    stream: Any
    """See ``data.Stream``."""
    holdout: list[int]
    """Keys of the held-out samples."""
    prompts: Sequence[Any]
    """What the sample grids show; ``str`` of each is its caption."""

    def scored_prompts(self, count: int) -> Sequence[Any]:
        """What the ``count`` images that are scored show, in turn."""

    @property
    def reads_images(self) -> bool:
        """Whether an image has to be decoded for an item."""

    def __getitem__(self, position: int) -> dict[str, Any]: ...


class Recipe(nn.Module):
    """A training method: its forward pass is its loss.

    The engine wraps the whole recipe where processes share the work (`training.engine`), so no part inside a recipe is
    wrapped. A submodule of the recipe whose parameters require a gradient is trained, averaged and checkpointed; one
    that ``moved`` names is checkpointed. The frozen parts belong to the family, which is a plain object, except a
    teacher, so that processes can share its weights. Random numbers come with the batch, because they are functions of
    a sample's position in the run.
    """

    Config: ClassVar[type[Run]]
    moved: tuple[str, ...] = ()
    """Submodules that `after_step` moves and no gradient does, such as a target network: they are saved with the rest.

    They require no gradient, and are fp32.
    """
    repeats = False
    """Whether the forward pass does the same with each batch of a shape, whatever the step and the values.

    Then a GPU may record it once (`training.repeated`).
    """
    step = 0
    """Optimizer steps taken so far; the loop sets it."""
    total_steps = 0
    """Optimizer steps of the whole run; the loop sets it before the first one."""

    def __init__(self, cfg: Any, device: device):
        super().__init__()
        self.cfg = cfg

    @property
    def phase_steps(self) -> int | None:
        """Optimizer steps of a phase, for a recipe that trains in phases: a run that is continued has to keep them."""
        return None

    def moved_weights(self) -> dict[str, Tensor]:
        """The parameters of what ``moved`` names, by their full names."""
        return {name: p for name, p in self.named_parameters() if name.partition(".")[0] in self.moved}

    def train(self, mode: bool = True) -> Self:
        """As every module, but a submodule of which nothing trains, such as a teacher, stays in evaluation mode."""
        super().train(mode)
        for part in self.children():
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def dataset(self, group: int, log: Callable[[str], None]) -> RecipeDataset:
        """A dataset that gives for each position in the run a dict of tensors and a ``name``.

        It has the attributes ``stream`` (see ``data.Stream``), ``holdout`` (the keys of the held-out samples),
        ``prompts`` (those of the sample grids) and ``scored_prompts`` (those of the scores).

        Args:
            group: images per optimizer step, over all processes.
            log: called with each line that the user should read.
        """
        raise NotImplementedError

    def forward(self, batch: dict[str, Any]) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of each image ``[B]``, or one loss for all; with figures ``[B]`` by name, if the method has any.

        A figure is averaged over the images for which it is not NaN, and logged beside the loss.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains, each group with its learning rate.

        A group with ``stop_fraction`` trains in the first part of the run only, which is that share of its steps.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trained, "lr": self.cfg.learning_rate}]

    def sample(self, prompts: list[Any], seeds: Iterable[int]) -> list[Image]:
        """An image for each prompt of the dataset and seed, for the sample grids of the run."""
        raise NotImplementedError

    def export(self, out: Path) -> list[Path]:
        """Write the artefact that diffusers loads into folder ``out``, and return the paths of all its files.

        Only the first process calls this; the model holds the average of the weights if the run keeps one. A file gets
        its final name when it is complete (``pipeline_folder.write_pipeline`` does that for a pipeline). Equal weights
        give equal bytes.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimizer step, for example to move a target network; ``step`` counts it already."""


def split_loss(out: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the figures that the forward pass of a recipe returned; without figures they are empty."""
    return out if isinstance(out, tuple) else (out, {})
