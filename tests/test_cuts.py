"""However a step is cut into batches, accumulation and processes, it sees the same samples with the same noise."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import command

OPTIONS = [
    "--learning-rate",
    "1e-4",
    "--random-flip",
    "--caption-dropout",
    "0.2",
    "--noise-offset",
    "0.05",
    "--use-ema",
    "--snr-gamma",
    "5",
]


def adapter(out):
    return load_file(out / "pytorch_lora_weights.safetensors")


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[k] - other[k]).abs().max().item() for k in one)


@pytest.fixture
def whole(lora):
    """One process, batch 8."""
    return adapter(lora("whole", *OPTIONS, "--train-batch-size", "8"))


def test_accumulation(lora, whole):
    cut = adapter(lora("cut", *OPTIONS, "--train-batch-size", "2", "--gradient-accumulation-steps", "4"))
    assert difference(whole, cut) < 1e-6


def test_two_processes(whole, sd, pictures, tmp_path):
    cut = ["--train-batch-size", "2", "--gradient-accumulation-steps", "2", "--num-processes", "2"]
    words = command(sd, pictures, tmp_path / "cut", *OPTIONS, *cut, "--num-validation-images", "3")
    done = subprocess.run([sys.executable, "-m", "sdtune", *words], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.distributed.run" in done.stderr  # the line it became is told
    assert "x 2 processes = 8" in done.stdout
    assert difference(whole, adapter(tmp_path / "cut")) < 1e-6


def test_another_seed_is_another_run(lora, whole):
    other = adapter(lora("other", *OPTIONS, "--train-batch-size", "8", "--seed", "1"))
    assert difference(whole, other) > 1e-4


def test_continued_with_another_cut(lora, whole):
    """A run may go on with another batch size, as long as a step stays the same images."""
    options = [*OPTIONS, "--train-batch-size", "8", "--steps", "4"]
    lora("moved", *options)
    resumed = lora("moved", *OPTIONS, "--train-batch-size", "4", "--gradient-accumulation-steps", "2")
    assert difference(whole, adapter(resumed)) < 1e-6


def test_every_trained_tensor_moved(whole):
    assert all(not torch.equal(t, torch.zeros_like(t)) for t in whole.values())
