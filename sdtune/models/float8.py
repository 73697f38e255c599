"""Linear layers that multiply 8-bit floats (Micikevicius et al. 2022), on GPUs that can.

Weights keep their precision. For each product the operands are scaled into e4m3, and the gradients that come back into
e5m2, with one scale for a tensor, computed each time; sums are in higher precision. All else is as in bf16.
"""

import torch
from torch import nn

from sdtune.config.sections import UserError

BLOCK = 16
"""What the sides of a matrix have to be multiples of."""


def compute_in_float8(module: nn.Module, device: torch.device, emulate: bool = False) -> None:
    """Have the linear layers of ``module`` compute in 8 bits, except adapters and sides that no block divides.

    Args:
        emulate: round as a GPU would, but multiply in 32 bits, on any device.

    Raises:
        UserError: the library is not there, or the device cannot.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError("--mixed-precision fp8: needs a GPU of compute capability 8.9 or more; bf16 works everywhere")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"--mixed-precision fp8: {error}; pip install 'sdtune[torchao]'") from None

    def takes(layer: nn.Module, name: str) -> bool:
        return type(layer) is nn.Linear and "lora_" not in name and not any(n % BLOCK for n in layer.weight.shape)

    # The gradient of a weight sums over rows, of which small batches have a number that no block divides
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(module, config=config, module_filter_fn=takes)
