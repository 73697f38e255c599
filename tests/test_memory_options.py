"""Gradient checkpointing and compilation reach the parts that can do it, and leave the others alone."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from sdtune.config.sections import UserError
from sdtune.models.memory_options import checkpoint_gradients, compile_blocks
from tests.contract import RECIPES


@pytest.mark.parametrize("recipe", ["textual-inversion", "dreambooth, adapters and a word"])
def test_gradient_checkpointing_with_a_new_token_changes_nothing_but_memory(recipe, trained):
    """The vectors of a new token are a part of these recipes, and have no blocks."""
    one, other = (
        trained(recipe, "one", "--steps", "2"),
        trained(recipe, "other", "--steps", "2", "--gradient-checkpointing"),
    )
    kept, recomputed = (RECIPES[recipe].artefact(run) for run in (one, other))
    for name, tensor in kept.items():
        assert torch.allclose(recomputed[name], tensor, atol=1e-5), name


def test_gradient_checkpointing_that_no_part_can_do_is_refused():
    with pytest.raises(UserError, match="--gradient-checkpointing: no part of this method can do it"):
        checkpoint_gradients([nn.Linear(1, 1)])


def test_a_model_that_names_no_repeated_blocks_is_compiled_as_a_whole():
    """diffusers refuses to compile the blocks of a network of pixels, since it names none."""
    unet = UNet2DModel(
        16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    token = nn.Linear(1, 1)
    compile_blocks([unet, token])
    assert unet._compiled_call_impl is not None
    assert token._compiled_call_impl is None
