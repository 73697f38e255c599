"""Many processes and recipes of one's own: the same code path, the true exit code."""

import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdtune.cli import main
from sdtune.run import checkpoints
from sdtune.run.signals import StopSignals
from tests import ranks
from tests.compare import assert_same_bits, difference
from tests.conftest import command, status

EXAMPLE = Path(__file__).parent.parent / "examples" / "my_lora.py"


@pytest.fixture(autouse=True)
def forget_example():
    yield
    sys.modules.pop("my_lora", None)


def own(sd, pictures, out, *options):
    return ["run", str(EXAMPLE), *command(sd, pictures, out, *options)[1:]]


def test_recipe_out_of_tree_has_flags_resume_and_record(sd, pictures, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert status(own(sd, pictures, whole, "--gain", "3")) == 0
    assert status(own(sd, pictures, cut, "--gain", "3", "--steps", "4")) == 0
    assert status(own(sd, pictures, cut, "--gain", "3")) == 0
    assert "continuing at step 4" in capsys.readouterr().out
    assert_same_bits(whole, cut)
    assert "gain: 3.0" in (cut / "config.yaml").read_text()
    assert status(own(sd, pictures, cut, "--gian", "3")) == 2
    assert "did you mean --gain" in capsys.readouterr().err


@pytest.mark.processes
def test_recipe_out_of_tree_runs_on_two_processes(sd, pictures, tmp_path, python):
    assert status(own(sd, pictures, tmp_path / "one", "--learning-rate", "1e-4")) == 0
    options = ["--learning-rate", "1e-4", "--train-batch-size", "1", "--num-processes", "2"]
    words = own(sd, pictures, tmp_path / "two", *options)
    launcher = ranks.Forked(partial(main, words), tmp_path / "output" / "launcher", python)
    assert launcher.exit_code() == 0, launcher.output("err")
    one, two = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("one", "two"))
    assert difference(one, two) < 1e-6


@pytest.mark.processes
def test_two_processes_stop_together_when_told(sd, pictures, tmp_path, python):
    out = tmp_path / "run"
    words = command(sd, pictures, out, "--steps", "200", "--num-processes", "2", "--checkpointing-steps", "0")
    metrics = out / "metrics.jsonl"
    begun = lambda: metrics.exists() and metrics.stat().st_size > 50  # noqa: E731
    code, said = ranks.interrupt(words, tmp_path / "output", signal.SIGTERM, begun, python)
    assert code == 143
    assert "continue with: sdtune lora" in said
    assert len(checkpoints.found(out / "checkpoints")) == 1


def test_signal_that_comes_while_processes_agree_counts_at_the_next_step(monkeypatch):
    coming = [signal.SIGTERM]
    with monkeypatch.context() as patch, StopSignals() as stopping:
        stopping.defer(True)
        patch.setattr(torch.distributed, "new_group", lambda backend, timeout: "peers")
        patch.setattr(
            torch.distributed, "all_reduce", lambda flag, op, group: [stopping._handle(n, None) for n in coming]
        )
        stopping.connect(world=2, patience=9)
        assert not stopping.agreed()
        coming.clear()
        assert stopping.agreed() and stopping.number == signal.SIGTERM


@pytest.mark.processes
def test_mistake_found_by_a_launched_process_is_exit_code_2(sd, pictures, tmp_path, python):
    words = command(sd, pictures, tmp_path / "run", "--target-modules", "to_nothing", "--num-processes", "2")
    launcher = ranks.Forked(partial(main, words), tmp_path / "output" / "launcher", python)
    assert launcher.exit_code() == 2
    assert "--target-modules to_nothing" in launcher.output("err")


def test_file_without_one_recipe(tmp_path, capsys):
    empty = tmp_path / "empty_recipe.py"
    empty.write_text("x = 1\n")
    assert status(["run", str(empty)]) == 2
    assert "exactly one class" in capsys.readouterr().err
