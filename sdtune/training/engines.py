"""Chooses the engine from the variables that accelerate's launcher sets."""

import os

from accelerate import Accelerator, FullyShardedDataParallelPlugin

from sdtune.config.sections import Run, UserError
from sdtune.recipes.recipe import Recipe
from sdtune.training.engine import Engine, Replicated, Sharded


def make_engine(recipe: Recipe, cfg: Run, accelerator: Accelerator) -> Engine:
    """The engine that the launcher asks for; it may replace the weights of the recipe by slices.

    Raises:
        UserError: the launcher asks for an engine that sdtune does not have.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UserError("accelerate config: sdtune does not train with DeepSpeed; use --accelerate-config fsdp2")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise UserError("accelerate config: fsdp_version 1 is not supported; write `fsdp_version: 2`")
        if accelerator.num_processes > 1:
            return Sharded(recipe, cfg, accelerator, plugin)
    kind = Replicated if accelerator.num_processes > 1 else Engine
    return kind(recipe, cfg, accelerator)
