"""Imports of what does the work of a command, once its options are valid; and work that makes as many objects."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Context of the first imports of libraries, without garbage collection.

    They make half a million objects, which stay. Python would look for garbage in all of them each time that there are
    a quarter more, and then for as long as the process lives.
    """
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


@contextmanager
def keeping() -> Iterator[None]:
    """Context of what makes many objects that stay, such as the rows of a dataset, without garbage collection."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def imported(entry: str) -> Any:
    """What ``module:name`` stands for."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)
