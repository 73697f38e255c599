"""How memory is asked for and handed back on Linux, for runs on a CPU."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""


def tune_malloc() -> None:
    """Have tensors from 4 MB on lie in pages of their own, and smaller ones stay with the process when they are freed.

    Left alone, glibc gives the end of its heap back at each step and gets it again, a page fault for 4 KB; and it keeps
    tensors of up to 32 MB in that heap, between whose remains others do not fit. What the environment says of malloc
    (``MALLOC_...``, or another library that is loaded before) stays as it is; so does every other C library.

    torch is asked for pages of 2 MB for its tensors, where the system gives them to those who ask.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once, with its first tensor
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(MMAP_THRESHOLD, 4 * 2**20)
        mallopt(TRIM_THRESHOLD, 512 * 2**20)
