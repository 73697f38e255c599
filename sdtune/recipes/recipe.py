"""The interface that a training method implements."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

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

    def __getitem__(self, position: int) -> dict[str, Any]: ...


class Recipe(nn.Module):
    """A training method: its forward pass is its loss.

    The engine wraps the whole recipe where processes share the work (`training.engine`), so no part inside a recipe is
    wrapped. A submodule of the recipe whose parameters require a gradient is trained, averaged and checkpointed; the
    frozen parts belong to the family, which is a plain object. Random numbers come with the batch, because they are
    functions of a sample's position in the run.
    """

    Config: ClassVar[type[Run]]

    def __init__(self, cfg: Any, device: device):
        super().__init__()
        self.cfg = cfg

    def dataset(self, group: int, log: Callable[[str], None]) -> RecipeDataset:
        """A dataset that gives for each position in the run a dict of tensors and a ``name``.

        It has the attributes ``stream`` (see ``data.Stream``), ``holdout`` (the keys of the held-out samples) and
        ``prompts`` (those of the sample grids).

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
        """Called after each optimizer step, for example to move a target network."""


def split_loss(out: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the figures that the forward pass of a recipe returned; without figures they are empty."""
    return out if isinstance(out, tuple) else (out, {})
