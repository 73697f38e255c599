"""Which image of a sharded set a position shows: shards permuted for each epoch, images inside a moving window.

An epoch is the shards in a permuted order, one after another, cut into ``lanes`` equal runs. A lane is an endless
stream of its own, and a step takes as many images of each, side by side: so a process, which has a run of a step's
positions, reads the shards of its own lanes and no others, though the order knows nothing of processes. Inside a lane
the images of a window are permuted. All of it is drawn from seed, epoch, lane and window: no buffer has a state.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from sdtune.run.rng import generator


class Place(NamedTuple):
    """One image of a sharded set."""

    shard: int
    nth: int
    """Among the images of its shard that the order may show."""
    lane: int
    live: frozenset[int]
    """The shards that the lane's window lies in."""


class Window(NamedTuple):
    key: tuple[int, int]
    order: np.ndarray
    live: frozenset[int]


class Lanes:
    """``lanes[position]`` is a ``Place``; a function of seed, group and position alone.

    Args:
        counts: images of each shard, int64 ``[shards]``; memory is a few numbers for each shard, none for each image.
        group: images per optimizer step.
        lanes: how many lanes there should be; there are as many as divide ``group`` too.
        window: images that are shuffled at a time, over all lanes.
    """

    def __init__(self, seed: int, counts: np.ndarray, group: int, lanes: int, window: int) -> None:
        self.seed, self.counts, self.group = seed, counts, group
        self.total = int(counts.sum())
        self.lanes = math.gcd(group, lanes)
        if self.lanes > self.total:
            self.lanes = 1
        self.window = max(1, window // self.lanes)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
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
        """Kept until the lane moves on: the positions of a worker only grow."""
        kept = self._windows.get(lane)
        if kept is None or kept.key != (epoch, number):
            drawn = torch.randperm(count, generator=generator(self.seed, "window", epoch, lane, number)).numpy()
            order, edges = self._epoch(epoch)
            shards = order[_slot(edges, first) : _slot(edges, first + count - 1) + 1]
            self._windows[lane] = kept = Window((epoch, number), drawn, frozenset(shards.tolist()))
        return kept

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and where each begins; lanes may be in two epochs at once."""
        if epoch not in self._epochs:
            order = torch.randperm(len(self.counts), generator=generator(self.seed, "shards", epoch)).numpy()
            self._epochs[epoch] = order, np.concatenate([[0], np.cumsum(self.counts[order])])
            if len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]


def _slot(edges: np.ndarray, rank: int) -> int:
    """Which run between ``edges`` holds ``rank``; empty runs hold none."""
    return int(np.searchsorted(edges, rank, side="right")) - 1
