"""Gradient checkpointing and compilation of the parts of a recipe, with a branch for each library.

Gradient checkpointing computes the activations of a block again in the backward pass, so that they need not be kept
(Chen et al. 2016).
"""

import os
from collections.abc import Iterable
from typing import Any

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from sdtune.config.sections import UserError
from sdtune.data import cache_root


def checkpoint_gradients(modules: Iterable[nn.Module]) -> None:
    """Turn on gradient checkpointing in each module that can do it; others (a new token's vectors) have no need.

    Raises:
        UserError: none of the modules can do it.
    """
    able = [module for module in modules if _can_checkpoint(module)]
    if not able:
        raise UserError("--gradient-checkpointing: no part of this method can do it; leave it out")
    for module in able:
        part: Any = module
        if isinstance(module, ModelMixin):
            part.enable_gradient_checkpointing()
        elif isinstance(module, PreTrainedModel):
            part.activation_checkpointing_enable()


def _can_checkpoint(module: nn.Module) -> bool:
    if isinstance(module, ModelMixin):
        return bool(module._supports_gradient_checkpointing)
    return isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing


REPEATED = {"UNet2DModel": ["ResnetBlock2D", "Attention"]}
"""Blocks that a model of diffusers repeats and does not name itself."""


def compile_blocks(modules: Iterable[nn.Module]) -> None:
    """Compile the models of diffusers: block by block where it is known which blocks are repeated, else as a whole.

    Modules of other libraries stay as they are: a text encoder takes a small part of a step. What was compiled is kept
    in the cache of sdtune, for the next run.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "compiled"))
    for module in modules:
        part: Any = module
        if isinstance(module, ModelMixin):
            part._repeated_blocks = part._repeated_blocks or REPEATED.get(type(part).__name__)
            if part._repeated_blocks:
                part.compile_repeated_blocks()
            else:
                part.compile()
