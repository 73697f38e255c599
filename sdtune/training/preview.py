"""What a run shows while it trains: sample images, and the loss of held-out images."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset

from sdtune.data.further import ImagePrompt
from sdtune.recipes.recipe import Recipe, RecipeDataset
from sdtune.run.contact_sheet import side_by_side
from sdtune.training.engine import Engine
from sdtune.training.log_window import Figures

Attempt = Callable[[Callable[[], Any]], Any]
"""Does the work given, or ends it early and returns None when a signal to stop comes; see `StopSignals.attempt`."""


def draw(
    recipe: Recipe, prompts: Sequence[Any], count: int, accelerator: Accelerator, attempt: Attempt
) -> list[tuple[int, Image]]:
    """This process's share of ``count`` images with their numbers; prompts and seeds never change during a run.

    All draw equally many, because they may hold the weights together, so numbers may go beyond ``count``. Empty if a
    signal to stop has ended the drawing.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = range(rank, math.ceil(count / world) * world, world)
    seeds = [recipe.cfg.seed + k for k in mine]
    images = attempt(lambda: recipe.sample([prompts[k % len(prompts)] for k in mine], seeds))
    return [] if images is None else list(zip(mine, images, strict=True))


def sample_images(
    recipe: Recipe, dataset: RecipeDataset, accelerator: Accelerator, attempt: Attempt
) -> tuple[list[Image], list[str]] | None:
    """The run's sample grid and its prompts. None if a signal to stop has ended the drawing on any process."""
    prompts, count = dataset.prompts, recipe.cfg.num_validation_images
    drawn = sorted(gather_object(draw(recipe, prompts, count, accelerator, attempt)), key=lambda pair: pair[0])
    if len(drawn) < count:
        return None
    shown = [prompts[k % len(prompts)] for k in range(count)]
    cells = [_cell(prompt, image) for prompt, (_, image) in zip(shown, drawn[:count], strict=True)]
    return cells, list(map(str, shown))


def _cell(prompt: Any, image: Image) -> Image:
    """What the sheet shows of an image: to its left the images that went with its prompt."""
    return side_by_side([*prompt.images, image]) if isinstance(prompt, ImagePrompt) else image


@torch.no_grad()
def holdout(engine: Engine, dataset: RecipeDataset, accelerator: Accelerator, attempt: Attempt) -> dict[str, float]:
    """Means over the held-out images of loss and figures, at timesteps and noise that never change.

    All processes make equally many forward passes, since they may hold the weights together.
    """
    cfg, keys = engine.recipe.cfg, dataset.holdout
    size = 1 if cfg.buckets else cfg.train_batch_size  # neighbours may differ in shape
    shares = [keys[rank :: accelerator.num_processes] for rank in range(accelerator.num_processes)]
    passes = math.ceil(len(shares[0]) / size)
    mine = shares[accelerator.process_index]
    parts = [mine[k * size : (k + 1) * size] for k in range(passes)]
    loader = DataLoader(cast(Dataset[Any], dataset), batch_sampler=[p or keys[:1] for p in parts])
    figures = Figures()

    def measure() -> None:
        for part, batch in zip(parts, loader, strict=True):
            batch.pop("name")
            loss, more = engine.without_training(engine.receive(batch))
            loss = loss.float().nan_to_num(torch.inf, posinf=torch.inf)  # a loss that is not finite still counts
            if part:
                named = {"holdout_loss": loss.expand(len(part))} | {f"holdout_{name}": v for name, v in more.items()}
                figures.add(named)

    attempt(measure)
    return figures.means()
