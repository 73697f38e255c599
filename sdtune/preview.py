"""What there is to see of a run while it trains: sample images, and the loss of held-out ones."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from PIL.Image import Image
from torch.utils.data import DataLoader

from sdtune.recipe import Recipe, told
from sdtune.window import Figures


def sample_images(recipe: Recipe, dataset: Any, accelerator: Accelerator) -> tuple[list[Image], list[str]]:
    """The run's sample grid and its prompts; each process draws its share, from seeds that never change."""
    cfg, rank, world = recipe.cfg, accelerator.process_index, accelerator.num_processes
    prompts = dataset.prompts
    wanted = [(k, prompts[k % len(prompts)]) for k in range(cfg.num_validation_images)]
    mine = wanted[rank::world]
    images = recipe.sample([p for _, p in mine], [cfg.seed + k for k, _ in mine]) if mine else []
    drawn = gather_object([(k, image) for (k, _), image in zip(mine, images, strict=True)])
    return [image for _, image in sorted(drawn, key=lambda pair: pair[0])], [prompt for _, prompt in wanted]


@torch.no_grad()
def holdout(recipe: Recipe, dataset: Any, accelerator: Accelerator) -> dict[str, float]:
    """Means over the held-out images of loss and figures, at timesteps and noise that never change."""
    cfg = recipe.cfg
    keys = dataset.holdout[accelerator.process_index :: accelerator.num_processes]
    size = 1 if cfg.buckets else cfg.train_batch_size  # neighbours may differ in shape
    figures = Figures()
    for batch in DataLoader(dataset, batch_sampler=[keys[i : i + size] for i in range(0, len(keys), size)]):
        count = len(batch.pop("name"))
        loss, more = told(recipe(send_to_device(batch, accelerator.device)))
        loss = loss.float().nan_to_num(torch.inf, posinf=torch.inf)  # a loss that is none is not left out
        figures.add({"holdout_loss": loss.expand(count)} | {f"holdout_{name}": v for name, v in more.items()})
    return figures.means()
