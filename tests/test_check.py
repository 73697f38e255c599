"""`sdtune check` and `--find-batch-size`: what is told before a run, of all methods, and everything that is wrong."""

import re

import pytest

from tests import contract
from tests.conftest import status


@pytest.mark.parametrize("recipe", contract.RECIPES)
def test_a_check_tells_what_a_run_does_and_needs_and_leaves_nothing(recipe, places, tmp_path, capsys):
    words = contract.command(recipe, places, tmp_path / "run", *contract.RECIPES[recipe].draws)
    assert status(["check", *words]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "images: 11" in out or "images: 22" in out
    assert re.search(r"^plan: 12 steps of 2 images x 1 accumulated x 1 processes = 2; .* parameters train$", out, re.M)
    assert "samples seen: 24\n" in out
    assert re.search(r"^disk: [\d.]+ MB a checkpoint, up to 3 at a time", out, re.M)
    parts = re.findall(r"^ +[\d.]+ [MG]B  (.*)$", out, re.M)
    assert {"weights, trained and frozen", "state of the optimizer", "activations, and the batch"} <= set(parts)
    assert not (tmp_path / "run").exists()
