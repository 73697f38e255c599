"""The order of images in a sharded dataset: shards are permuted for each epoch, images inside a window.

An epoch is all shards in a permuted order, cut into ``lanes`` equal parts. Each lane is an endless stream, and a step
takes equally many images from each lane, one lane after another. So a process, which reads consecutive positions of a
step, reads only the shards of its own lanes, although the order does not depend on the processes. Inside a lane the
images of a window are permuted. Everything is drawn from seed, epoch, lane and window: there is no shuffle buffer
whose state would have to be saved.
"""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from sdtune.run.rng import generator

IntArray: TypeAlias = "npt.NDArray[np.int64]"


class Place(NamedTuple):
    """Where an image of a sharded dataset is."""

    shard: int
    nth: int
    """Its number among the images of its shard that are trained on."""
    lane: int
    live: frozenset[int]
    """The shards that the lane's window covers."""


class Window(NamedTuple):
    key: tuple[int, int]
    order: IntArray
    live: frozenset[int]


class ShardOrder:
    """``order[position]`` is a ``Place``. It depends on seed, group and position only.

    Args:
        counts: images of each shard, int64 ``[shards]``. Memory grows with the shards, not with the images.
        group: images per optimizer step.
        lanes: lanes asked for; there are as many as also divide ``group``.
        window: images that are shuffled at a time, in all lanes together.
    """

    def __init__(self, seed: int, counts: IntArray, group: int, lanes: int, window: int) -> None:
        self.seed, self.counts, self.group = seed, counts, group
        self.total = int(counts.sum())
        self.lanes = math.gcd(group, lanes)
        if self.lanes > self.total:
            self.lanes = 1
        self.window = max(1, window // self.lanes)
        self._epochs: dict[int, tuple[IntArray, IntArray]] = {}
        self._windows: dict[int, Window] = {}

    def __getitem__(self, position: int) -> Place:
        step, j = divmod(position, self.group)
        share = self.group // self.lanes
        lane, k = divmod(j, share)
        begin, end = (edge * self.total // self.lanes for edge in (lane, lane + 1))
        epoch, turn = divmod(step * share + k, end - begin)
        number, slot = divmod(turn, self.window)
        first = begin + number * self.window
        window = self._window(lane, epoch, number, first, min(self.window, end - first))
        order, edges = self._epoch(epoch)
        at = _slot(edges, first + int(window.order[slot]))
        return Place(int(order[at]), first + int(window.order[slot]) - int(edges[at]), lane, window.live)

    def _window(self, lane: int, epoch: int, number: int, first: int, count: int) -> Window:
        """Remembers only the last window of a lane, since the positions of a worker only grow."""
        window = self._windows.get(lane)
        if window is None or window.key != (epoch, number):
            drawn = torch.randperm(count, generator=generator(self.seed, "window", epoch, lane, number)).numpy()
            order, edges = self._epoch(epoch)
            shards = order[_slot(edges, first) : _slot(edges, first + count - 1) + 1]
            self._windows[lane] = window = Window((epoch, number), drawn, frozenset(shards.tolist()))
        return window

    def _epoch(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The shards in the order of an epoch, and where each begins. Lanes may be in two epochs at the same time."""
        if epoch not in self._epochs:
            order = torch.randperm(len(self.counts), generator=generator(self.seed, "shards", epoch)).numpy()
            self._epochs[epoch] = order, np.concatenate([[0], np.cumsum(self.counts[order])])
            if len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]


def _slot(edges: IntArray, rank: int) -> int:
    """The number of the interval between ``edges`` that holds ``rank``; empty intervals hold none."""
    return int(np.searchsorted(edges, rank, side="right")) - 1
