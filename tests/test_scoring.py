"""Runs that are scored while they train: figures, the best step, its resume, early ends, tables, comparisons."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from sdtune.config.scores import SCORES, score_name, score_of
from sdtune.evaluation.distances import diversity, likeness, memorisation, nearest_distances
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.run import artefacts, checkpoints
from sdtune.run.contact_sheet import cells
from sdtune.run.metrics_file import read_lines
from sdtune.training import preview
from sdtune.training.scoring import Best
from tests import contract, ranks
from tests.conftest import status

SCORED = (
    *("--evaluate-steps", "2", "--num-evaluation-images", "4", "--validation-inference-steps", "1"),
    *("--steps", "6", "--checkpointing-steps", "3", "--keep-best", "likeness", "--export-steps", "4"),
    *("--num-validation-images", "2", "--validation-steps", "3", "--validation-guidance-scale", "1"),
)


@pytest.fixture
def run(shared) -> Path:
    return shared("lora", *SCORED)


def scored(out: Path) -> dict[int, dict[str, float]]:
    """The scores of each step that has them."""
    found: dict[int, dict[str, float]] = {}
    for line in read_lines(out / "metrics.jsonl"):
        of_score = [name for name in line if score_of(name.removesuffix("_low").removesuffix("_high"))]
        if scores := {name: line[name] for name in of_score}:
            found.setdefault(line["step"], {}).update(scores)
    return found


def test_scores_of_a_run(run):
    figures = scored(run)
    assert list(figures) == [0, 2, 4, 6]
    for found in figures.values():
        for score in ("likeness", "diversity", "memorisation"):
            name = score_name(score, "random-conv")
            assert SCORES[score].least <= found[name] <= SCORES[score].greatest
            assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    values = {step: found["likeness_random_conv"] for step, found in figures.items()}
    step, folder = artefacts.best(run)
    assert step == max(values, key=values.get)
    of_step = {6: run, 4: run / "exports" / "step-000004"}
    if step in of_step:  # the same weights as the artefact of that step
        assert (folder / contract.RECIPES["lora"].weights).read_bytes() == (
            of_step[step] / contract.RECIPES["lora"].weights
        ).read_bytes()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Likeness (random conv)" in page and "Best step" in page
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.processes
def test_a_killed_run_keeps_the_same_best_and_figures(run, places, tmp_path):
    out = tmp_path / "run"
    words = contract.command("lora", places, out, *SCORED)
    ranks.interrupt(words, tmp_path / "output", 9, lambda: 4 in scored(out))
    assert checkpoints.found(out / "checkpoints")[-1].name == "step-000003"
    assert status(words) == 0
    assert scored(out) == scored(run)
    assert artefacts.best(out)[0] == artefacts.best(run)[0]
    weights = contract.RECIPES["lora"].weights
    for folder in ("", "best"):
        assert (out / folder / weights).read_bytes() == (run / folder / weights).read_bytes()


def test_scores_that_a_stop_cuts_short_are_measured_when_the_run_goes_on(places, tmp_path, monkeypatch):
    options = (*SCORED[:10], "--num-holdout-images", "3", "--keep-best", "holdout_loss", "--num-validation-images", "0")
    whole, cut = (contract.command("lora", places, tmp_path / name, *options) for name in ("whole", "cut"))
    assert status(whole) == 0
    calls, real = [], preview.holdout

    def stopped(*args):
        calls.append(1)
        if len(calls) != 3:  # after two at the start, the first one of step 2
            return real(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return {"holdout_loss": 0.0}  # of the images so far

    with monkeypatch.context() as patch:
        patch.setattr(preview, "holdout", stopped)
        assert status(cut) == 128 + signal.SIGTERM
    assert list(scored(tmp_path / "cut")) == [0]
    assert status(cut) == 0
    assert scored(tmp_path / "cut") == scored(tmp_path / "whole")
    assert artefacts.best(tmp_path / "cut")[0] == artefacts.best(tmp_path / "whole")[0]


@pytest.mark.processes
def test_two_processes_score_as_one(run, shared):
    both = scored(shared("lora", *SCORED, "--train-batch-size", "1", world=2))
    one = scored(run)
    assert both.keys() == one.keys()
    for step in one:
        assert both[step] == pytest.approx(one[step], abs=0.02)


def test_a_classifier_looks_for_the_class_that_a_prompt_names(places, tmp_path, capsys):
    classifier = tmp_path / "classifier"
    torch.manual_seed(0)
    blocks = ("DownBlock2D", "DownBlock2D")
    NoisyClassifier(16, 3, 2, (8, 16), blocks, 1, 8, 4).save_pretrained(classifier)
    DDPMScheduler().save_pretrained(classifier / "scheduler")
    (classifier / "classes.json").write_text(json.dumps(["red circle", "blue star"]))
    out = tmp_path / "run"
    words = contract.command("lora", places, out, *SCORED[:6], "--steps", "1", "--classifier", str(classifier))
    words += ["--num-validation-images", "0", "--keep-best", "class_accuracy"]
    assert status([*words, "--validation-prompt", "a green circle"]) == 2
    assert '"a green circle" names no class of it; it knows red circle, blue star' in capsys.readouterr().err
    assert status([*words, "--validation-prompt", "a red circle", "a small blue star"]) == 0
    figures = scored(out)
    assert all(0 <= of["class_accuracy"] <= 1 for of in figures.values())
    best = max(of["class_accuracy"] for of in figures.values())
    assert artefacts.best(out)[0] == max(step for step, of in figures.items() if of["class_accuracy"] == best)


def test_of_equal_scores_the_later_step_is_kept_and_counts_as_no_better(tmp_path):
    cfg = SimpleNamespace(keep_best="likeness", patience=3, output_dir=tmp_path, evaluate_steps=1)
    best = Best(cfg, 0)
    kept = [best.update(step, {"likeness_x": value}) for step, value in enumerate((0.5, 0.7, 0.7, 0.6, 0.7))]
    assert kept == [True, True, True, False, True]
    assert (best.step, best.since, best.exhausted) == (4, 3, True)


def test_patience_ends_a_run_which_stays_ended(places, tmp_path, capsys):
    out = tmp_path / "run"
    words = contract.command(
        *("lora", places, out, *SCORED, "--num-holdout-images", "3", "--keep-best", "holdout_loss"),
        *("--learning-rate", "1e-9", "--patience", "1", "--export-steps", "0"),
    )
    assert status(words) == 0
    said = capsys.readouterr().out
    ended = max(scored(out))
    assert ended < 6 and f"ended at step {ended}" in said and "--patience" in said
    assert artefacts.artefact(out, ended)
    assert status(words) == 0
    assert "trained for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep-best", "kernel"], "--keep-best kernel: add --num-holdout-images"),
        (["--keep-best", "holdout_loss"], "--num-holdout-images"),
        (["--keep-best", "clip_score"], "--clip-model"),
        (["--keep-best", "beauty"], "keep-best"),
        (["--features", "no-such-network"], "--features no-such-network"),
        (["--evaluate-steps", "0", "--keep-best", "likeness"], "--evaluate-steps"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(places, tmp_path, capsys, options, said):
    assert status(contract.command("lora", places, tmp_path / "run", *SCORED[:4], *options)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_best_is_drawn_and_pushed_when_asked(run, sd, tmp_path, capsys):
    folder = artefacts.best(run)[1]
    words = ["sample", "--prompt", "a red circle", "--steps", "1", "--width", "32", "--height", "32"]
    assert status([*words, "--adapter", f"{run}=0.5", "--best", "--output-dir", str(tmp_path / "a")]) == 0
    assert status([*words, "--adapter", f"{folder}=0.5", "--output-dir", str(tmp_path / "b")]) == 0
    same = [Image.open(tmp_path / name / "00000.png").tobytes() for name in ("a", "b")]
    assert same[0] == same[1]
    other = shutil.copytree(run, tmp_path / "without")
    shutil.rmtree(other / "best")
    assert status([*words, "--adapter", str(other), "--best"]) == 2
    assert "kept no best step" in capsys.readouterr().err


def test_a_table_over_two_settings(run, tmp_path, capsys):
    words = ["sample", "--prompt", "a red circle", "--steps", "1", "--width", "32", "--height", "32"]
    words += ["--adapter", str(run), "--output-dir", str(tmp_path)]
    assert status([*words, "--xy", "scale=0,1", "step=4,6"]) == 0
    with Image.open(tmp_path / "xy.png") as sheet:
        found = {caption: image.tobytes() for image, caption in cells(sheet)}
    assert list(found) == ["scale 0, step 4", "scale 1, step 4", "scale 0, step 6", "scale 1, step 6"]
    assert found["scale 0, step 4"] == found["scale 0, step 6"]
    for axes, said in (
        (["scale=1", "step=5"], "has steps 4, 6"),
        (["scale=1"], "two different axes"),
        (["mood=1", "step=4"], "begin with one of"),
        (["scale=a", "step=4"], "give numbers"),
    ):
        assert status([*words, "--xy", *axes]) == 2
        assert said in capsys.readouterr().err


def test_compare(run, shared, uninterrupted_lora, tmp_path, capsys):
    assert status(["compare", str(run), str(uninterrupted_lora), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["evaluate_steps"] == {run.name: 2, uninterrupted_lora.name: 0}
    assert found["runs"][run.name]["artefact_bytes"] > 0
    page = tmp_path / "page.html"
    again = shutil.copytree(run, tmp_path / "again")
    assert status(["compare", str(run), str(again), "--output", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "All settings are the same" in html and "Likeness" in html and 'type="range"' in html
    assert "http" not in html
    assert status(["compare", str(run), str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
    for runs in ([run], [run, run]):
        assert status(["compare", *map(str, runs)]) == 2


@pytest.fixture
def uninterrupted_lora(shared) -> Path:
    return shared("lora", "--steps", "2")


def test_watch_lists_runs(run, tmp_path, capsys):
    assert status(["watch", str(run)]) == 0
    said = capsys.readouterr().out
    assert "finished" in said and "6/6" in said and "Likeness" in said
    copy = shutil.copytree(run, tmp_path / "runs" / "a")
    written = json.loads((copy / "status.json").read_text())
    (copy / "status.json").write_text(json.dumps(written | {"state": "running"}))
    assert status(["watch", str(tmp_path / "runs")]) == 0
    assert "killed" in capsys.readouterr().out  # no process holds the folder
    assert status(["watch", str(tmp_path / "none")]) == 2


def test_scores_by_hand():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(12, 5, generator=generator)
    assert likeness(y[:1], y[:1]) == pytest.approx(1)
    pairs = torch.nn.functional.cosine_similarity(y[:3, None], y[None, 3:], dim=2)
    assert likeness(y[:3], y[3:]) == pytest.approx(float(pairs.mean()), abs=1e-6)
    assert diversity(y, y) == pytest.approx(1)
    assert diversity(y[:1].expand(4, 5), y) == pytest.approx(0)
    assert diversity(2 * y, y) == pytest.approx(2)
    copies, fresh = nearest_distances(y[:4], y), nearest_distances(torch.randn(6, 5, generator=generator), y)
    assert memorisation(copies, fresh) == 1
    assert memorisation(fresh, fresh) == 0.5
    assert float(nearest_distances(y, y, without_itself=True).min()) > 0
    twice = memorisation(copies, fresh, torch.tensor([1, 0, 0, 1.0]), torch.ones(6))
    assert twice == memorisation(copies[[0, 3]], fresh)


def test_names_of_scores_are_read_back():
    for score in SCORES:
        for network in ("random-conv", "inception", "clip"):
            assert score_of(score_name(score, network)) == score
    assert score_of("loss") is None and score_of("train_likeness") is None
