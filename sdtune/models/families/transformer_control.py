"""ControlNets of transformers: copies of the base's first blocks, each with a layer behind it that starts at zero."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.families.latent import LatentFamily


class TransformerControl(LatentFamily):
    """A family whose ControlNets follow the latents of an image."""

    control_of_latents: ClassVar[bool] = True

    def inputs(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the denoiser, and of networks made from it."""
        raise NotImplementedError

    def unread_layers(self, controlnet: Any) -> str | None:
        """Where text and image meet in the last block: it gives text that nothing reads, and what makes it."""
        last = rf"transformer_blocks\.{controlnet.config.num_layers - 1}"
        return rf"{last}\.(attn\.(add_q_proj|norm_added_q|to_add_out)|ff_context)"


def copied_blocks(kind: Any, transformer: Any, changes: Mapping[str, Any]) -> Any:
    """A ControlNet of class ``kind`` with the settings of a transformer but ``changes``, and its weights.

    What the transformer has not begins at zero, as diffusers makes it. On the meta device its shapes alone.
    """
    with torch.device(transformer.device):
        network = kind.from_config({**transformer.config, **changes})
    if transformer.device.type == "meta":
        return network
    theirs = transformer.state_dict()
    own = {name: theirs[name] for name, tensor in network.state_dict().items() if matches(theirs.get(name), tensor)}
    network.load_state_dict(own, strict=False)
    return network.to(transformer.dtype)


def matches(theirs: torch.Tensor | None, own: torch.Tensor) -> bool:
    return theirs is not None and theirs.shape == own.shape


def check_layers(option: str, asked: int, of_base: int, used: int) -> None:
    """Raises: UserError where a ControlNet would have more blocks than the base reads.

    Args:
        of_base: blocks of the base.
        used: how many of ``asked`` it would read.
    """
    if asked > of_base or used < asked:
        raise UserError(
            f"{option} {asked}: of so many blocks this base, which has {of_base}, would read {min(used, of_base)}; "
            "give fewer"
        )
