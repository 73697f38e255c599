"""The device that computes, and what it says when its memory is full."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sdtune.config.errors import RunFailed


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


def out_of_memory(error: BaseException, device: torch.device) -> str:
    """What is said of such an error, in one line."""
    where = "the GPU" if device.type == "cuda" else "the machine"
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"out of memory on {where} ({first[:150]})"


@contextmanager
def less_memory_with(ways: Sequence[str]) -> Iterator[None]:
    """Where the memory is full, the options that need less are named.

    Raises:
        RunFailed: in place of torch's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error.with_traceback(None)  # it holds the frames whose tensors fill the memory
        help_ = f"; it needs less with {', or '.join(ways)}" if ways else ""
        raise RunFailed(f"{out_of_memory(error, best_device())}{help_}") from None
