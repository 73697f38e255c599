"""A step on a GPU is a few launches: a small one is bound by the host, which hands them over one by one."""

from pathlib import Path

from torch.nn.utils import clip_grad

import bench


def test_a_step_in_half_precision_launches_few_kernels(monkeypatch):
    """Of `tiny`; Stable Diffusion 1.5 has 2,153 by `bench/launches.py --shape sd15 --bf16`, and may have 2,600."""
    monkeypatch.syspath_prepend(Path(next(iter(bench.__path__))))
    monkeypatch.setattr(clip_grad, "_has_foreach_support", clip_grad._has_foreach_support)  # which the count replaces
    import launches

    with launches.config("tiny", 64, True, []) as cfg:
        assert sum(launches.count(cfg).found.values()) < 1200
