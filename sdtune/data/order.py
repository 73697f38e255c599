"""Which image a position shows: seeded permutations one after another, and one shape per optimizer step."""

import torch

from sdtune.run.rng import generator


class Order:
    """``order[position]`` is an index; a function of seed and position alone.

    Each bucket is an endless stream: a permutation of its images (times ``repeats``), then another, with no
    seam at the end of an epoch, so that a bucket smaller than a group works too. In a round each bucket gives
    as many groups as its images fill, the last not quite, and the groups of a round are permuted. With one
    bucket this is the plain stream of permutations, whatever the group.

    Args:
        buckets: the indices of the images of one shape, for each shape.
        group: images per optimizer step.
    """

    def __init__(self, seed: object, buckets: list[list[int]], repeats: int, group: int) -> None:
        self.seed, self.buckets, self.repeats, self.group = seed, buckets, repeats, group
        self.groups = [-(-len(bucket) * repeats // group) for bucket in buckets]  # per round
        self._kept: dict[object, tuple[int, list]] = {}

    def __getitem__(self, position: int) -> int:
        step, j = divmod(position, self.group)
        number, slot = divmod(step, sum(self.groups))
        bucket, nth = self._round(number)[slot]
        indices = self.buckets[bucket]
        epoch, i = divmod(nth * self.group + j, len(indices) * self.repeats)
        return indices[self._permutation(bucket, len(indices) * self.repeats, epoch)[i] % len(indices)]

    def _round(self, number: int) -> list[tuple[int, int]]:
        """For each step of a round its bucket, and how many groups that bucket gave before it."""
        kept = self._kept.get("round")
        if kept is None or kept[0] != number:
            slots = [bucket for bucket, groups in enumerate(self.groups) for _ in range(groups)]
            given = [number * groups for groups in self.groups]
            steps = []
            for slot in self._permutation("rounds", len(slots), number):
                steps.append((slots[slot], given[slots[slot]]))
                given[slots[slot]] += 1
            self._kept["round"] = kept = (number, steps)
        return kept[1]

    def _permutation(self, name: object, count: int, epoch: int) -> list[int]:
        """Kept until another epoch is asked for: the positions of a worker only grow."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != epoch:
            drawn = torch.randperm(count, generator=generator(self.seed, "order", name, epoch))
            self._kept[name] = kept = (epoch, drawn.tolist())
        return kept[1]
