"""What is done to the modules of a recipe before they train: 8-bit products, gradient checkpointing, compilation."""

import torch

from sdtune.config.sections import Run, UserError
from sdtune.models.float8 import compute_in_float8
from sdtune.models.memory_options import checkpoint_gradients, compile_blocks
from sdtune.recipes.recipe import Recipe
from sdtune.run.precision import precision_of


def prepare_modules(recipe: Recipe, cfg: Run, device: torch.device) -> None:
    """Have the parts of a recipe compute in 8 bits, checkpoint their gradients, or compile, as the config asks."""
    if cfg.compile and device.type == "cpu":
        raise UserError("--compile: on a CPU torch.compile returns wrong gradients beside a right loss; leave it out")
    if precision_of(cfg) == "fp8":
        for module in recipe.children():
            compute_in_float8(module, device)
    if cfg.gradient_checkpointing:
        checkpoint_gradients(recipe.children())
    if cfg.compile:
        compile_blocks(recipe.children())
