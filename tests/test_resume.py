"""A run that is cut short and continued ends with the same bits as one that is not."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from sdtune import checkpoints
from tests.conftest import command, status

VARIANTS = {
    "plain": [],
    "workers": ["--dataloader-num-workers", "2"],
    "accumulation": ["--train-batch-size", "1", "--gradient-accumulation-steps", "2"],
    "average": ["--use-ema", "--ema-power", "0.75"],
    "text encoder, dropout": ["--train-text-encoder", "--dropout", "0.1", "--lr-scheduler", "cosine"],
    "random crops, flips, buckets": ["--no-center-crop", "--random-flip", "--buckets", "--bucket-step", "8"],
}


def tensors(out):
    """All that the last checkpoint of a run holds, and its artefact."""
    groups, _ = checkpoints.load(checkpoints.found(out / "checkpoints")[-1])
    flat = {f"{group}.{name}": t for group, named in groups.items() for name, t in named.items()}
    return flat | load_file(out / "pytorch_lora_weights.safetensors")


def assert_same_bits(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def start_then_kill(words, out, number, when):
    """Run a command line in a process of its own and send it a signal once ``when()`` holds; its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "sdtune", *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not when() and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert child.poll() is None, "it ended before it could be interrupted"
    child.send_signal(number)
    printed, _ = child.communicate(timeout=60)
    return child.returncode, printed


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_run_continues_to_the_same_bits(name, lora, sd, pictures, tmp_path):
    options = [*VARIANTS[name], "--steps", "60", "--checkpointing-steps", "7", "--log-steps", "50"]
    whole = lora("whole", *options)
    words = command(sd, pictures, tmp_path / "cut", *options)
    saved = tmp_path / "cut" / "checkpoints" / "step-000021"
    code, _ = start_then_kill(words, tmp_path / "cut", signal.SIGKILL, saved.exists)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "cut" / "pytorch_lora_weights.safetensors").exists()
    assert status(words) == 0
    assert_same_bits(whole, tmp_path / "cut")
