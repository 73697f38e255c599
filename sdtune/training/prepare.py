"""What is done to the modules of a recipe before they train: bits, device, gradient checkpointing, compilation."""

import torch

from sdtune.config.sections import Adapter, Run, UserError
from sdtune.models.float8 import compute_in_float8
from sdtune.models.fused_lora import fuse_adapters
from sdtune.models.lean_layers import keep_less
from sdtune.models.memory_options import checkpoint_gradients, compile_blocks
from sdtune.models.quantize import quantize
from sdtune.recipes.finetune import FineTune
from sdtune.recipes.recipe import Recipe
from sdtune.run.precision import precision_of


def prepare_modules(recipe: Recipe, cfg: Run, device: torch.device) -> None:
    """Move a recipe to ``device``; have its parts be in few bits, checkpoint their gradients, or compile, as asked.

    Adapters compute in fewer operations (`fused_lora`), and layers keep less (`lean_layers`), to the same bits. On
    a CPU large convolutions of few places are products, which changes the last bits.

    A base in fewer bits is coded a layer at a time, so that the device never holds all of it in full. Shapes without
    values stay where they are.
    """
    if cfg.compile and device.type == "cpu":
        raise UserError("--compile: on a CPU torch.compile returns wrong gradients beside a right loss; leave it out")
    if any(p.device.type != "meta" for p in recipe.parameters()):
        if isinstance(recipe, FineTune) and isinstance(cfg, Adapter) and cfg.quantize_base:
            for part in recipe.trained.values():
                quantize(part, cfg.quantize_base, device)
        recipe.to(device)
    if precision_of(cfg) == "fp8":
        for module in recipe.children():
            compute_in_float8(module, device)
    if not cfg.compile:  # a compiler does this itself
        keep_less(recipe)
        if isinstance(cfg, Adapter):
            fuse_adapters(recipe)
    if cfg.gradient_checkpointing:
        checkpoint_gradients(recipe.children())
    if cfg.compile:
        compile_blocks(recipe.children())
