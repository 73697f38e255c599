"""A run that is cut short and continued ends with the same bits as one that is not."""

import signal

import pytest

from tests import ranks
from tests.compare import assert_same_bits
from tests.conftest import status
from tests.contract import RECIPES, command

CASES = [(recipe, name) for recipe, contract in RECIPES.items() for name in contract.variants]
LENGTH = ["--steps", "4", "--checkpointing-steps", "2", "--log-steps", "50"]


@pytest.mark.fault("The process is killed at any step", "The same command continues to the same bits.")
@pytest.mark.processes
@pytest.mark.parametrize(("recipe", "name"), CASES, ids=[f"{recipe}-{name}" for recipe, name in CASES])
def test_killed_run_continues_to_the_same_bits(recipe, name, trained, places, tmp_path):
    if name == "8 bits":
        pytest.importorskip("torchao")
    options = [*RECIPES[recipe].variants[name], *LENGTH]
    whole, cut = trained(recipe, "whole", *options), tmp_path / "cut"
    words = command(recipe, places, cut, *options)
    first = cut / "checkpoints" / "step-000002"
    code, _ = ranks.interrupt(words, tmp_path / "output", signal.SIGKILL, first.exists)
    assert code == -signal.SIGKILL
    assert not (cut / RECIPES[recipe].weights).exists()
    assert status(words) == 0
    assert_same_bits(whole, cut, recipe)


@pytest.mark.processes
def test_real_process_killed_from_outside_continues_to_the_same_bits(shared, places, tmp_path):
    options = ["--steps", "16", "--checkpointing-steps", "3", "--log-steps", "50"]
    cut = tmp_path / "cut"
    words = command("lora", places, cut, *options)
    code, _ = ranks.launch_and_interrupt(words, signal.SIGKILL, (cut / "checkpoints" / "step-000006").exists)
    assert code == -signal.SIGKILL
    assert not (cut / RECIPES["lora"].weights).exists()
    assert status(words) == 0
    assert_same_bits(shared("lora", *options), cut)
