"""Where the time of a step goes: waiting for data, forward, backward, the optimizer, and the rest.

On a GPU the host only hands work over, so the time of a part is that between two marks in the GPU's own queue; they
are read when a line of metrics is due, which has waited for the GPU already.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PARTS = ("data_wait", "forward", "backward", "graph", "optimizer")
"""The parts that are measured: ``data_wait`` is the host's, ``graph`` a recording of both passes."""


class StepTimes:
    """The seconds of each part since the last `shares`.

    Args:
        on_gpu: whether steps are computed on a GPU.
    """

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside belongs to a part."""
        if self.on_gpu and name != "data_wait":
            begun = self._mark()
            yield
            self.marks.append((name, begun, self._mark()))
            return
        start = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - start

    def shares(self, seconds: float) -> dict[str, float]:
        """The share of each part in ``seconds``, and that of the rest: 0 to 1."""
        for name, begun, ended in self.marks:
            self.seconds[name] += begun.elapsed_time(ended) / 1000
        found = {name: round(min(self.seconds[name] / seconds, 1.0), 4) for name in PARTS}
        self.seconds.clear()
        self.marks.clear()
        return found | {"rest": round(max(0.0, 1 - sum(found.values())), 4)}

    @staticmethod
    def _mark() -> Any:
        import torch

        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark
