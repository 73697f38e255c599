"""However a step is cut into batches, accumulation and processes, it sees the same samples with the same noise."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests import ranks
from tests.contract import RECIPES, command


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[k] - other[k]).abs().max().item() for k in one)


@pytest.fixture(params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture
def artefact(recipe, trained):
    """What a run of the recipe, with all that it can draw and more options, has learnt."""

    def run(name, *options):
        return RECIPES[recipe].artefact(trained(recipe, name, *RECIPES[recipe].draws, *options))

    return run


@pytest.fixture
def whole(artefact):
    """One process, batch 8."""
    return artefact("whole", "--train-batch-size", "8")


def test_accumulation(artefact, whole):
    assert difference(whole, artefact("cut", "--train-batch-size", "2", "--gradient-accumulation-steps", "4")) < 1e-6


def test_two_processes(recipe, whole, places, tmp_path):
    cut = ["--train-batch-size", "2", "--gradient-accumulation-steps", "2", "--num-processes", "2"]
    contract = RECIPES[recipe]
    words = command(recipe, places, tmp_path / "cut", *contract.draws, *cut, *contract.previews)
    done = subprocess.run([sys.executable, "-m", "sdtune", *words], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --config_file" in done.stderr  # the line it became is told
    assert "2 a process x 2 accumulated x 2 processes = 8 a step" in done.stdout
    assert difference(whole, contract.artefact(tmp_path / "cut")) < 1e-6


@pytest.mark.parametrize("recipe", ["lora", "dreambooth", "textual-inversion", "ddpm"])
def test_four_processes_and_a_checkpoint_of_two_that_one_and_four_continue(recipe, trained, places, tmp_path):
    contract = RECIPES[recipe]
    options = [*contract.draws, *contract.previews, "--use-ema", "--validation-inference-steps", "1"]

    def learnt(world, name, steps=4):
        out, cut = tmp_path / name, ["--train-batch-size", str(8 // world), "--steps", str(steps)]
        words = command(recipe, places, out, *options, *cut)
        ranks.trained(world, words, tmp_path / f"{name}-said")
        return contract.artefact(out)

    whole = contract.artefact(trained(recipe, "whole", *options, "--train-batch-size", "8", "--steps", "4"))
    assert difference(whole, learnt(4, "four")) < 1e-6
    learnt(2, "moved", steps=2)
    shutil.copytree(tmp_path / "moved", tmp_path / "again")
    assert difference(whole, learnt(1, "moved")) < 1e-6
    assert difference(whole, learnt(4, "again")) < 1e-6


def test_another_seed_is_another_run(artefact, whole):
    assert difference(whole, artefact("other", "--train-batch-size", "8", "--seed", "1")) > 1e-4


def test_continued_with_another_cut(artefact, whole):
    """A run may go on with another batch size, as long as a step stays the same images."""
    artefact("moved", "--train-batch-size", "8", "--steps", "4")
    resumed = artefact("moved", "--train-batch-size", "4", "--gradient-accumulation-steps", "2")
    assert difference(whole, resumed) < 1e-6


def test_every_trained_tensor_moved(whole):
    assert all(not torch.equal(t, torch.zeros_like(t)) for t in whole.values())
