"""Where the processes of a run wait for each other, however long one of them works alone."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

POLL = 0.05
"""Seconds between two reads of a counter in the store."""


def store_barrier() -> None:
    """Wait until all processes have called this, however long one of them works alone (writes, encodes, samples).

    A collective would fail after `--ddp-timeout`; this polls counters in the store. A process that dies or hangs
    meanwhile is noticed by the threads that watch it (see `ProcessGroupWatch`). In `parted` it does not wait.
    """
    if not distributed.is_initialized() or apart.is_set():
        return
    in_barrier.set()
    try:
        _meet_in_store()
    finally:
        in_barrier.clear()


in_barrier = threading.Event()
"""Set while this process waits in `store_barrier`."""
apart = threading.Event()
"""Set in `parted`."""


@contextmanager
def parted() -> Iterator[None]:
    """Context of a process that has failed: it reads its data again without the others, which wait elsewhere."""
    apart.set()
    try:
        yield
    finally:
        apart.clear()


def _meet_in_store() -> None:
    world, store = distributed.get_world_size(), distributed.distributed_c10d._get_default_store()
    # No process enters the next barrier before all have entered this one, so the count gives the barrier's number
    number = math.ceil(store.add("sdtune/entered", 1) / world)
    wait_for(store, "sdtune/entered", number * world)
    store.add("sdtune/left", 1)
    if distributed.get_rank() == 0:  # it may host the store, which must outlive the others' reads
        wait_for(store, "sdtune/left", number * world)


def wait_for(store: Any, key: str, count: int) -> None:
    while store.add(key, 0) < count:
        time.sleep(POLL)
