"""Randomness as a function of names, never of history.

A generator is made from what the number is for, such as ``generator(seed, "noise", position)``, so the
number does not depend on when, where or on how many processes it is drawn. Nothing random has to be
saved, so nothing can be restored wrongly. Numbers are drawn on the CPU: a CUDA generator maps
elements to counters by the number of multiprocessors of the card, so its stream differs between cards.

Never slice a larger draw: ``torch.randn(8)`` is not ``torch.randn(16)[:8]``.
"""

import hashlib

import torch


def key(*names: object) -> int:
    """63 bits that depend on ``names`` (their ``repr``) alone."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little") >> 1


def generator(*names: object) -> torch.Generator:
    """A CPU generator whose whole stream is a function of ``names``."""
    return torch.Generator().manual_seed(key(*names))


def seed_model(value: int, device: torch.device) -> None:
    """Seed what modules draw from the global generators (dropout), on the CPU and on the run's own GPU.

    ``torch.manual_seed`` does the same for every device there is, at a millisecond a call.
    """
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
