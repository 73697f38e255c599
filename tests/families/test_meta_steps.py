"""A step on bases of several kinds lets the host run ahead of a GPU, and needs no float64."""

import pytest

from tests import contract
from tests.test_gpu_ready import watch_steps

BY_NAME = {"flux", "flux-2-klein"}
"""Bases whose angles diffusers computes in float32 where the device is called mps; meta is not."""


@pytest.mark.parametrize("base", ["sdxl", "sd3", "flux", "flux-2-klein", "z-image", "qwen-image"])
def test_a_step_copies_nothing_but_its_batch_and_needs_no_float64(base, bases, places, tmp_path, monkeypatch):
    words = contract.command("lora", places, tmp_path / "run", "--model", str(bases(base)))
    *_, last = watch_steps(words, monkeypatch)
    assert last.float64 == [] or base in BY_NAME
