"""Which engine a run has: what the launcher says of it, accelerate leaves in the environment."""

import importlib
import os

from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin

from sdtune.config.sections import Run, UserError
from sdtune.recipes.recipe import Recipe
from sdtune.training.engine import Engine, Replicated, Sharded


def spread(recipe: Recipe, cfg: Run, accelerator: Accelerator) -> Engine:
    """The engine that the launcher asks for; the recipe's weights may be others after it.

    Raises:
        UserError: what the launcher asks for is not to be had.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise UserError("accelerate config: fsdp_version 1 is not supported; write `fsdp_version: 2`")
        if accelerator.num_processes > 1:
            return Sharded(recipe, cfg, accelerator, plugin)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        try:
            zero = importlib.import_module("sdtune.training.zero")
        except ImportError as error:
            raise UserError(f"accelerate config: DeepSpeed: {error}; pip install 'sdtune[deepspeed]'") from None
        return zero.Zero(recipe, cfg, accelerator, DeepSpeedPlugin())
    kind = Replicated if accelerator.num_processes > 1 else Engine
    return kind(recipe, cfg, accelerator)
