"""The device that computes, and what it says when its memory is full."""

import torch


def best_device(mps: bool = True) -> torch.device:
    """CUDA's if there is one, else Apple's, else the CPU.

    Args:
        mps: whether Apple's will do: it has no 64-bit numbers, and its memory cannot be asked for.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU or of the machine is full; torch has no class for the latter."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
