"""However a step is cut into batches, accumulation and processes, it sees the same samples with the same noise."""

import shutil

import pytest
import torch

from tests import ranks
from tests.compare import difference
from tests.contract import RECIPES, command

WHOLE = ["--train-batch-size", "8", "--steps", "4"]


@pytest.fixture(params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture
def whole(recipe, shared):
    """What a run of the recipe with all that it can draw has learnt: one process, batch 8."""
    return RECIPES[recipe].artefact(shared(recipe, *RECIPES[recipe].draws, *WHOLE))


def test_continued_with_accumulation(recipe, whole, trained):
    """A run may go on with another batch size, as long as a step stays the same images."""
    draws = RECIPES[recipe].draws
    trained(recipe, "cut", *draws, "--train-batch-size", "8", "--steps", "2")
    cut = trained(recipe, "cut", *draws, "--train-batch-size", "2", "--gradient-accumulation-steps", "4", *WHOLE[2:])
    assert difference(whole, RECIPES[recipe].artefact(cut)) < 1e-6


@pytest.mark.processes
def test_two_processes(recipe, whole, places, tmp_path):
    """By the real launcher for one recipe, without one for the others."""
    cut, contract = ["--train-batch-size", "2", "--gradient-accumulation-steps", "2"], RECIPES[recipe]
    words = command(recipe, places, tmp_path / "cut", *contract.draws, *cut, *WHOLE[2:], *contract.previews)
    if recipe == "lora":
        done = ranks.launch([*words, "--num-processes", "2"])
        assert done.returncode == 0, done.stderr
        assert "ACCELERATE_USE_CPU=true accelerate launch --config_file" in done.stderr  # the line it became is shown
        printed = done.stdout
    else:
        printed = ranks.train(2, words, tmp_path / "output")
    assert "2 a process x 2 accumulated x 2 processes = 8 a step" in printed
    assert difference(whole, contract.artefact(tmp_path / "cut")) < 1e-6


@pytest.mark.processes
@pytest.mark.parametrize("recipe", ["dreambooth", "ddpm"], indirect=True)
def test_a_checkpoint_of_two_processes_that_one_and_four_continue(recipe, shared, places, tmp_path):
    contract = RECIPES[recipe]
    options = [*contract.draws, *contract.previews, "--use-ema"]

    def learnt(world, name, steps=4):
        out, cut = tmp_path / name, ["--train-batch-size", str(8 // world), "--steps", str(steps)]
        ranks.train(world, command(recipe, places, out, *options, *cut), tmp_path / f"{name}-output")
        return contract.artefact(out)

    whole = contract.artefact(shared(recipe, *options, *WHOLE))
    learnt(2, "moved", steps=2)
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    assert difference(whole, learnt(1, "moved")) < 1e-6
    assert difference(whole, learnt(4, "copied")) < 1e-6


def test_another_seed_is_another_run(recipe, whole, trained):
    other = trained(recipe, "other", *RECIPES[recipe].draws, *WHOLE, "--seed", "1")
    assert difference(whole, RECIPES[recipe].artefact(other)) > 1e-5


def test_every_trained_tensor_moved(whole):
    assert all(not torch.equal(t, torch.zeros_like(t)) for t in whole.values())
