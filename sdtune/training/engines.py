"""Chooses the engine from the variables that accelerate's launcher sets."""

import os

from accelerate import Accelerator, FullyShardedDataParallelPlugin

from sdtune.config.sections import Adapter, Optim, Run, UserError
from sdtune.recipes.recipe import Recipe
from sdtune.training import optim
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
            refuse_what_cannot_be_sliced(cfg)
            return Sharded(recipe, cfg, accelerator, plugin)
    kind = Replicated if accelerator.num_processes > 1 else Engine
    return kind(recipe, cfg, accelerator)


def refuse_what_cannot_be_sliced(cfg: Run) -> None:
    """Raises: UserError for options that do not work, or save nothing, where each process holds a slice (FSDP2)."""
    if isinstance(cfg, Optim):
        chosen = "adamw8bit" if cfg.use_8bit_adam else cfg.optimizer
        path, _ = optim.NAMED.get(chosen, (chosen, ""))
        if path.startswith("bitsandbytes"):
            flag = "--use-8bit-adam" if cfg.use_8bit_adam else f"--optimizer {chosen}"
            raise UserError(
                f"{flag}: the kernels of bitsandbytes do not work on slices of weights (FSDP2); "
                "--optimizer torchao_adamw8bit does"
            )
    if isinstance(cfg, Adapter) and cfg.quantize_base:
        raise UserError(
            f"--quantize-base {cfg.quantize_base}: saves no memory where the weights are in slices (FSDP2), since each "
            "process decodes whole weights; leave it out, or train without FSDP2"
        )
