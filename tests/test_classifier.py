"""``sdtune classifier``: its artefact loads alone, it tells accuracy by noise level, and has a gradient to guide by."""

import json
import math

import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import DDPMScheduler

from sdtune.config.methods.classifier import ClassifierConfig
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.recipes.recipe import Recipe
from sdtune.training import preview
from sdtune.training.engine import Engine
from sdtune.training.log_window import Figures
from tests import contract
from tests.conftest import status

FILES = ["classes.json", "config.json", "diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
PARTS = ["t0_199", "t200_399", "t400_599", "t600_799", "t800_999"]


@pytest.fixture
def classifier(trained):
    return lambda name, *options: trained("classifier", name, *options)


@pytest.fixture
def refused(places, tmp_path, capsys):
    def run(*options: str) -> str:
        capsys.readouterr()
        words = contract.command("classifier", places, tmp_path / "refused", *options)
        assert status([*words, "--overwrite"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_artefact_loads_alone(shared, classifier):
    run, other = shared("classifier"), classifier("other")
    assert [f for f in FILES if (run / f).read_bytes() != (other / f).read_bytes()] == []
    network = NoisyClassifier.from_pretrained(run)
    names = json.loads((run / "classes.json").read_text())
    assert len(names) == network.config.num_classes == 11
    assert (network.config.sample_size, network.config.in_channels) == (16, 3)
    logits = network(torch.randn(2, 3, 16, 16), torch.tensor([0, 999]))
    assert logits.shape == (2, 11)
    assert DDPMScheduler.from_pretrained(run, subfolder="scheduler").config.beta_schedule == "linear"
    assert {w.dtype for w in network.parameters()} == {torch.float32}


def test_logits_depend_on_the_timestep_and_have_a_gradient_at_the_image(shared):
    network = NoisyClassifier.from_pretrained(shared("classifier")).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([10, 700])
    logits = network(x, t)
    assert not torch.allclose(logits, network(x, t.flip(0)))
    assert torch.allclose(network(x[:1], t[0]), logits[:1])  # one timestep for all images works as well
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 3].sum(), x)
    step = 1e-6 * torch.randn_like(x)
    before, after = (network(at, t).log_softmax(1)[:, 3].sum() for at in (x - step, x + step))
    assert ((after - before) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=1e-5)


def test_attention_pool_sees_where_things_are():
    network = NoisyClassifier(16, 1, 3, (8, 16), ("DownBlock2D", "AttnDownBlock2D"), 1, 8, 4)
    image = torch.zeros(1, 1, 16, 16)
    image[..., :4, :4] = 1
    assert not torch.allclose(network(image, torch.tensor([0])), network(image.flip(-1), torch.tensor([0])), atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(shared, classifier):
    runs = shared("classifier"), classifier("other", "--gradient-checkpointing")
    one, other = (contract.RECIPES["classifier"].artefact(run) for run in runs)
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-6


def test_accuracy_is_told_by_noise_level(classifier):
    options = ["--dataset", "digits", "--class-column", "folder", "--resolution", "8", "--attention-resolutions", "4"]
    options += ["--block-out-channels=16", "--block-out-channels=32", "--attention-head-dim", "16"]
    options += ["--steps", "150", "--train-batch-size", "64", "--learning-rate", "3e-3", "--log-steps", "75"]
    options += ["--beta-schedule", "squaredcos_cap_v2"]
    options += ["--num-holdout-images", "100", "--validation-steps", "0", "--checkpointing-steps", "0"]
    lines = lines_of(classifier("run", *options))
    trained = [line for line in lines if "loss" in line]
    held = [line for line in lines if "holdout_loss" in line]
    assert [line["step"] for line in trained] == [75, 150]
    assert {f"accuracy_{part}" for part in PARTS} <= trained[-1].keys()
    assert {f"holdout_accuracy_{part}" for part in PARTS} <= held[-1].keys()
    assert held[-1]["holdout_loss"] < 0.9 * held[0]["holdout_loss"]
    assert held[-1]["holdout_accuracy_t0_199"] > 0.5  # 0.1 is chance
    assert held[-1]["holdout_accuracy_t800_999"] < 0.3  # little is left to see
    shares = [round(held[-1][f"holdout_accuracy_{part}"] * 100, 6) for part in PARTS]
    assert shares == [round(share) for share in shares]  # each part counts the 100 held-out images once


def test_with_few_timesteps_the_parts_are_fifths_of_them(classifier):
    run = classifier("run", "--num-train-timesteps", "7", "--beta-end", "0.9", "--steps", "4")
    names = [name for name in lines_of(run)[-1] if name.startswith("accuracy")]
    assert names == [f"accuracy_t{low}_{high}" for low, high in ((0, 0), (1, 1), (2, 3), (4, 4), (5, 6))]


def test_what_is_wrong_is_told(refused, places, tmp_path, capsys):
    words = contract.command("classifier", places, tmp_path / "x")
    at = words.index("--class-column")
    capsys.readouterr()
    assert status([*words[:at], *words[at + 2 :]]) == 2
    assert capsys.readouterr().err == "error: --class-column: is required\n"
    assert "a classifier sees one shape" in refused("--buckets")
    assert "wants a multiple of 2" in refused("--resolution", "17")
    assert "the folder" not in refused("--class-column", "no-such")
    assert "--num-validation-images: no such option" in refused("--num-validation-images", "3")


# ---- figures of a recipe -------------------------------------------------------------------------------


def test_figures_are_means_over_the_images_that_have_them():
    PartialState()
    figures = Figures()
    nan = math.nan
    figures.add({"a": torch.tensor([1.0, nan, 0.0]), "b": torch.tensor([nan, nan, nan])})
    figures.add({"a": torch.tensor([1.0]), "c": torch.tensor([4.0])})
    means = figures.means()
    assert (means["a"], means["c"]) == (pytest.approx(2 / 3), 4.0)
    assert math.isnan(means["b"])
    assert Figures().means() == {}


class Pictures(torch.utils.data.Dataset):
    holdout = (0, 1, 2)

    def __getitem__(self, key):
        return {"name": str(key), "x": torch.tensor(float(key))}


class Lost(Recipe):
    """Loses one image's loss."""

    def forward(self, batch):
        return torch.where(batch["x"] == 1, torch.nan, batch["x"]), {"x": batch["x"]}


def test_a_held_out_loss_that_is_none_is_not_left_out():
    cfg = ClassifierConfig(dataset="d", class_column="c", train_batch_size=2)
    engine = Engine(Lost(cfg, None), cfg, Accelerator())
    told = preview.holdout(engine, Pictures(), Accelerator(), lambda work: work())
    assert told["holdout_x"] == 1.0
    assert not math.isfinite(told["holdout_loss"])
