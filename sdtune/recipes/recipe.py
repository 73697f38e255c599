"""What a method has to say for itself."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL.Image import Image
from torch import Tensor, device, nn
from torch.utils.data import Dataset

from sdtune.config.sections import Run


class Recipe(nn.Module):
    """A training method: its forward pass is its loss.

    The loop hands the recipe itself to accelerate, so inside a recipe nothing is ever wrapped. What is assigned as
    a submodule and requires a gradient is trained, averaged and checkpointed; the frozen rest hangs off a plain
    object. Random numbers come with the batch, since they are functions of a sample's position in the run.
    """

    Config: ClassVar[type[Run]]

    def __init__(self, cfg: Any, device: device):
        super().__init__()
        self.cfg = cfg

    def dataset(self, group: int, log: Callable[[str], None]) -> Dataset:
        """Position in the run -> dict of tensors and a ``name``; ``group`` images make up an optimizer step.

        It has a ``stream`` (see ``data.Stream``), lists the keys of held-out samples as ``holdout``, and what
        the sample grids show as ``prompts``.
        """
        raise NotImplementedError

    def forward(self, batch: dict[str, Any]) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of each image ``[B]``, or one for all; where there is more to tell, figures ``[B]`` by name as well.

        Figures are averaged over the images for which they are not NaN, and logged beside the loss.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains, with learning rates; ``stop_fraction`` is the share of the run in which a group moves."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trained, "lr": self.cfg.learning_rate}]

    def sample(self, prompts: Sequence[str], seeds: Iterable[int]) -> list[Image]:
        """An image of each prompt, to look at during training."""
        raise NotImplementedError

    def export(self, out: Path) -> list[Path]:
        """Write what diffusers loads into folder ``out``, and return every file of it, those in folders below too.

        Called by the first process alone, with the average in place where one is kept. Each file gets its name when
        it is whole (``pipelines.write_pipeline`` does that for a pipeline); equal weights give equal bytes.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimizer step; target networks move here."""


def split_loss(out: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a recipe's forward pass gave: the loss, and its figures, if there are any."""
    return out if isinstance(out, tuple) else (out, {})
