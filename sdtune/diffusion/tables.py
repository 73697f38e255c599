"""Fixed numbers that each step reads, kept on the device: a copy from main memory would make the host wait for it."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}
"""Types of devices that have no 64-bit floats."""


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype of numbers whose rounding shows, such as a noise schedule: float64 where the device has it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


class Table:
    """A fixed tensor, copied once to each device, in each dtype, that asks for it.

    Args:
        values: any shape, as exact as they are known.
    """

    def __init__(self, values: Tensor):
        self.values = values
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """The values on ``device``; floats in ``dtype``, or else in the widest that the device has."""
        if dtype is None:
            dtype = widest_float(device) if self.values.dtype == torch.float64 else self.values.dtype
        if (device, dtype) not in self._copies:
            self._copies[device, dtype] = self.values.to(dtype).to(device)
        return self._copies[device, dtype]

    def at(self, places: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The values at ``places``, int64 ``[B]``, on their device."""
        return self.on(places.device, dtype).index_select(0, places)
