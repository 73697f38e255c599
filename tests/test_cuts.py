"""However a step is cut into batches, accumulation and processes, it sees the same samples with the same noise."""

import shutil

import pytest
import torch

from tests import ranks
from tests.compare import difference
from tests.contract import METHODS, RECIPES, command

WHOLE = ["--train-batch-size", "8", "--steps", "4"]
FOUR = ["dreambooth", "ddpm"]
"""Recipes of a base and of pixels that go on with four processes, too."""


@pytest.fixture(params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture
def whole(recipe, shared):
    """What a run of the recipe with all that it can draw has learnt: one process, batch 8."""
    return RECIPES[recipe].artefact(shared(recipe, *RECIPES[recipe].draws, *WHOLE))


@pytest.mark.processes
def test_two_processes_then_one_then_four(recipe, whole, places, trained, tmp_path):
    """A run may go on with another batch size and number of processes, as long as a step stays the same images.

    By the real launcher for one recipe, without one for the others.
    """
    contract, cut = RECIPES[recipe], tmp_path / "cut"
    two = [*contract.previews, *contract.cut(2, 2), "--steps", "2"]
    words = command(recipe, places, cut, *contract.draws, *two)
    if recipe == "lora":
        done = ranks.launch([*words, "--num-processes", "2"])
        assert done.returncode == 0, done.stderr
        assert "ACCELERATE_USE_CPU=true accelerate launch --config_file" in done.stderr  # the line it became is shown
        printed = done.stdout
    else:
        printed = ranks.train(2, words, tmp_path / "output")
    told = "4 a process x 1 accumulated" if contract.chunks else "2 a process x 2 accumulated"
    assert f"{told} x 2 processes = 8 a step" in printed
    if recipe in FOUR:
        shutil.copytree(cut, tmp_path / "copied")
        words = command(recipe, places, tmp_path / "copied", *contract.draws, "--train-batch-size", "2", *WHOLE[2:])
        ranks.train(4, words, tmp_path / "four")
        assert difference(whole, contract.artefact(tmp_path / "copied")) < 1e-6
    one = [*contract.cut(2, 4), *WHOLE[2:]]
    assert difference(whole, contract.artefact(trained(recipe, "cut", *contract.draws, *one))) < 1e-6


@pytest.mark.parametrize("recipe", METHODS.values(), indirect=True)
def test_another_seed_is_another_run(recipe, whole, trained):
    other = trained(recipe, "other", *RECIPES[recipe].draws, *WHOLE, "--seed", "1")
    assert difference(whole, RECIPES[recipe].artefact(other)) > 1e-5


def test_every_trained_tensor_moved(whole):
    assert all(not torch.equal(t, torch.zeros_like(t)) for t in whole.values())
