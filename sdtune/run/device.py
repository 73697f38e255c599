"""The device that computes."""

import torch


def best_device(mps: bool = True) -> torch.device:
    """CUDA's if there is one, else Apple's, else the CPU.

    Args:
        mps: whether Apple's will do: it has no 64-bit numbers, and its memory cannot be asked for.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")
