"""A step on bases of several kinds lets the host run ahead of a GPU, and needs no float64."""

import pytest

from tests import contract
from tests.test_gpu_ready import watch_steps


@pytest.mark.parametrize("base", ["sdxl", "sd3", "z-image", "qwen-image"])
def test_a_step_copies_nothing_but_its_batch_and_needs_no_float64(base, bases, places, tmp_path, monkeypatch):
    watch_steps(contract.command("lora", places, tmp_path / "run", "--model", str(bases(base))), monkeypatch)
