"""A run that is cut short and continued ends with the same bits as one that is not."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sdtune.run import checkpoints
from tests.conftest import status
from tests.contract import RECIPES, command

CASES = [(recipe, name) for recipe, contract in RECIPES.items() for name in contract.variants]


def tensors(out, recipe="lora"):
    """All that the last checkpoint of a run holds, and its artefact."""
    groups, _ = checkpoints.load(checkpoints.found(out / "checkpoints")[-1])
    flat = {f"{group}.{name}": t for group, named in groups.items() for name, t in named.items()}
    return flat | RECIPES[recipe].artefact(out)


def assert_same_bits(one, other, recipe="lora"):
    one, other = tensors(one, recipe), tensors(other, recipe)
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


@pytest.mark.parametrize(("recipe", "name"), CASES, ids=[f"{recipe}-{name}" for recipe, name in CASES])
def test_killed_run_continues_to_the_same_bits(recipe, name, trained, places, tmp_path):
    if name == "8 bits":
        pytest.importorskip("torchao")
    options = [*RECIPES[recipe].variants[name], "--steps", "60", "--checkpointing-steps", "7", "--log-steps", "50"]
    whole, cut = trained(recipe, "whole", *options), tmp_path / "cut"
    words = command(recipe, places, cut, *options)
    saved = cut / "checkpoints" / "step-000021"
    code, _ = start_then_kill(words, cut, signal.SIGKILL, saved.exists)
    assert code == -signal.SIGKILL
    assert not (cut / RECIPES[recipe].weights).exists()
    assert status(words) == 0
    assert_same_bits(whole, cut, recipe)
