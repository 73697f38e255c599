"""Networks made out of others: the same with other settings."""

from typing import Any

import torch


@torch.no_grad()
def reshaped(module: Any, **changes: Any) -> Any:
    """A model of diffusers with some settings changed: the weights that it had, and zeros where it has more.

    So it begins as it was, whatever further channels hold. On the meta device its shapes alone.
    """
    with torch.device(module.device):
        new = type(module).from_config({**module.config, **changes})
    if module.device.type != "meta":
        old = module.state_dict()
        for name, weight in new.state_dict().items():
            weight.zero_()
            if name in old:
                weight[tuple(slice(n) for n in old[name].shape)] = old[name]
    return new.to(module.dtype)
