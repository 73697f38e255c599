"""The order of images: one seeded permutation after another, and one shape per optimizer step."""

import torch

from sdtune.run.rng import generator


class Order:
    """``order[position]`` is the index of an image. It depends on seed and position only.

    Each bucket is an endless stream: a permutation of its images (times ``repeats``), then another one. Groups run
    across the end of an epoch, so a bucket may be smaller than a group. In a round each bucket gives
    as many groups as its images fill, rounded up, and the groups of a round are permuted. With one
    bucket this is one permutation after another, whatever the group.

    Args:
        buckets: for each shape, the indices of its images.
        group: images per optimizer step.
    """

    def __init__(self, seed: object, buckets: list[list[int]], repeats: int, group: int) -> None:
        self.seed, self.buckets, self.repeats, self.group = seed, buckets, repeats, group
        self.groups = [-(-len(bucket) * repeats // group) for bucket in buckets]  # per round
        self._rounds: tuple[int, list[tuple[int, int]]] = (-1, [])
        self._permutations: dict[object, tuple[int, list[int]]] = {}

    def __getitem__(self, position: int) -> int:
        step, j = divmod(position, self.group)
        number, slot = divmod(step, sum(self.groups))
        bucket, nth = self._round(number)[slot]
        indices = self.buckets[bucket]
        epoch, i = divmod(nth * self.group + j, len(indices) * self.repeats)
        return indices[self._permutation(bucket, len(indices) * self.repeats, epoch)[i] % len(indices)]

    def _round(self, number: int) -> list[tuple[int, int]]:
        """For each step of a round its bucket, and how many groups that bucket gave before it."""
        if self._rounds[0] != number:
            slots = [bucket for bucket, groups in enumerate(self.groups) for _ in range(groups)]
            given = [number * groups for groups in self.groups]
            steps = []
            for slot in self._permutation("rounds", len(slots), number):
                steps.append((slots[slot], given[slots[slot]]))
                given[slots[slot]] += 1
            self._rounds = (number, steps)
        return self._rounds[1]

    def _permutation(self, name: object, count: int, epoch: int) -> list[int]:
        """Remembers only the last epoch asked for, since the positions of a worker only grow."""
        last = self._permutations.get(name)
        if last is None or last[0] != epoch:
            drawn = torch.randperm(count, generator=generator(self.seed, "order", name, epoch))
            self._permutations[name] = last = (epoch, drawn.tolist())
        return last[1]
