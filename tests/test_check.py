"""`sdtune check` and `--find-batch-size`: what is told before a run, of every method, and everything that is wrong."""

import re

import pytest
import torch
import yaml

from sdtune.config import parsing
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.recipes.lora import Lora
from sdtune.training import batch_size, memory_estimate
from tests import contract
from tests.conftest import command, status

KNOWN: dict[str, memory_estimate.MemoryEstimate] = {}
"""Estimates by the options that they are made of; each takes seconds."""


@pytest.fixture
def steady(monkeypatch):
    """The process itself is a gigabyte, whatever the tests before have imported; an estimate is made once."""
    monkeypatch.setattr(memory_estimate, "resident", lambda: 10**9)
    real = batch_size.estimate

    def once(recipe, dataset, device, base=None):
        key = repr((device, recipe.cfg.model_dump(mode="json", exclude={"output_dir", "steps"})))
        if key not in KNOWN:
            KNOWN[key] = real(recipe, dataset, device, base)
        return KNOWN[key]

    monkeypatch.setattr(batch_size, "estimate", once)


@pytest.mark.parametrize("recipe", contract.METHODS.values())
def test_a_check_tells_what_a_run_does_and_needs_and_leaves_nothing(recipe, places, tmp_path, capsys):
    words = contract.command(recipe, places, tmp_path / "run", *contract.RECIPES[recipe].draws)
    assert status(["check", *words]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "images: 11" in out or "images: 22" in out
    share = "(, 1 of the subject and 1 of its class)?"
    cut = f"2 a process x 1 accumulated x 1 processes = 2 a step{share}; 6 steps = 12 samples"
    assert re.search(rf"^plan: .*; {cut}, .* parameters train$", out, re.M)
    assert re.search(r"^disk: [\d.]+ MB a checkpoint, up to 3 at a time", out, re.M)
    parts = re.findall(r"^ +[\d.]+ [MG]B  (.*)$", out, re.M)
    assert {"weights, trained and frozen", "state of the optimizer", "activations, and the batch"} <= set(parts)
    assert not (tmp_path / "run").exists()


def test_everything_that_is_wrong_is_told_at_once(sd, pictures, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no picture")
    wrong = ["--dataset", tmp_path / "bad", "--caption", "x", "--model", tmp_path, "--report-to", "nobody"]
    wrong += ["--lr-scheduler", "piecewise_constant", "--optimizer", "adam"]
    assert status(["check", "lora", *map(str, wrong), "--output-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    for problem in ("0.png", "no model_index.json", "--report-to nobody", "--optimizer adam", "--lr-step-rules"):
        assert problem in told


def test_a_run_of_other_options_is_in_the_way(copied, sd, pictures, tmp_path, capsys):
    copied("lora", "run")
    assert status(["check", *command(sd, pictures, tmp_path / "run", "--rank", "7")]) == 2
    assert "holds a run with another config (--rank was 4, is 7)" in capsys.readouterr().err


def test_what_makes_a_run_fit_is_estimated(steady, sd, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batch_size, "savings", lambda cfg: iter([{"gradient_checkpointing": True}]))
    words = command(sd, pictures, tmp_path / "run", "--train-batch-size", "2")
    estimates = batch_size.Estimates(Lora, config_of(words), torch.device("cpu"), 1)
    whole, half = estimates.of().total, estimates.of(train_batch_size=1, gradient_accumulation_steps=2).total
    assert half < whole
    assert status(["check", *words, "--memory", f"{half}"]) == 2
    told = capsys.readouterr().err
    assert "it fits with" in told
    assert f"--train-batch-size 1 --gradient-accumulation-steps 2: {batch_size.human_bytes(half)}" in told
    assert status(["check", *words, "--memory", "1GB"]) == 2  # as much as the process itself
    assert "nothing makes it fit" in capsys.readouterr().err
    assert status(["check", *words, "--memory", "8 goats"]) == 2
    assert "--memory 8 goats: wants a size, such as 8GB" in capsys.readouterr().err


def test_the_largest_batch_that_fits_is_found_and_the_step_stays_what_it_is(steady, sd, pictures, tmp_path, capsys):
    words = command(sd, pictures, tmp_path / "run", "--train-batch-size", "2", "--gradient-accumulation-steps", "2")
    estimates = batch_size.Estimates(Lora, config_of(words), torch.device("cpu"), 1)
    limit = estimates.of(train_batch_size=2, gradient_accumulation_steps=2).total
    assert status([*words, "--steps", "1", "--find-batch-size", "--memory", f"{limit}"]) == 0
    assert "--find-batch-size: --train-batch-size 2 --gradient-accumulation-steps 2, " in capsys.readouterr().out
    cut = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (cut["train_batch_size"], cut["gradient_accumulation_steps"]) == (2, 2)
    assert status([*words, "--steps", "2", "--find-batch-size", "--memory", "100GB"]) == 0  # as many images a step
    out = capsys.readouterr().out
    assert "--train-batch-size 4 --gradient-accumulation-steps 1" in out
    assert "continuing at step 1" in out
    assert status([*words, "--memory", "1GB"]) == 2
    assert "--memory: goes with --find-batch-size" in capsys.readouterr().err


def config_of(words):
    """The config that a command line stands for."""
    names = [word[2:].replace("-", "_") for word in words[1::2]]
    return parsing.resolve(LoraConfig, None, dict(zip(names, words[2::2], strict=True)), [])


@pytest.mark.parametrize(("text", "size"), [("8GB", 8e9), ("7.5gib", 7.5 * 2**30), ("512 MB", 512e6), ("1000", 1000)])
def test_sizes_are_read_as_they_are_written(text, size):
    assert batch_size.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "8XB", "8 GB of it"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="--memory"):
        batch_size.parse_size(text)


def test_a_recipe_of_ones_own_is_checked_too(sd, pictures, tmp_path, capsys):
    words = command(sd, pictures, tmp_path / "run")[1:]
    assert status(["check", "run", "examples/my_lora.py", *words, "--gain", "3"]) == 0, capsys.readouterr().err
    assert "memory: " in capsys.readouterr().out


def test_class_images_that_are_not_there_yet_are_counted_as_what_they_will_be(places, tmp_path, capsys):
    words = contract.command("dreambooth", places, tmp_path / "run", "--class-prompt", "a circle")
    k = words.index("--class-data")
    words[k + 1] = str(tmp_path / "none")
    words[words.index("--num-class-images") + 1] = "7"
    assert status(["check", *words]) == 0
    said = capsys.readouterr().out
    assert "images: 18, 7 of them of the class" in said
    assert "class images that the run will make: 7 of 7" in said
    assert "exact copies" not in said
    assert not (tmp_path / "none").exists()
    k = words.index("--class-prompt")
    assert status(["check", *words[:k], *words[k + 2 :]]) == 2
    assert "0 of --num-class-images 7, and nothing to make more from" in capsys.readouterr().err
