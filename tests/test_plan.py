"""The plan spells a run out before it begins, and the learning rate that it names is the one that is used."""

import json
from types import SimpleNamespace

import pytest

from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.run import plan
from sdtune.run.plan import short
from tests.conftest import status
from tests.contract import command


@pytest.mark.parametrize(
    ("number", "text"), [(1e-4, "1e-4"), (8e-4, "8e-4"), (1.25e-5, "1.25e-5"), (0.05, "0.05"), (0.0099, "9.9e-3")]
)
def test_rates_are_told_as_people_write_them(number, text):
    assert short(number) == text
    assert float(text) == pytest.approx(number)


def rates(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_scaled_rate_is_spelt_out_and_does_not_depend_on_how_a_step_is_cut(trained, capfd):
    options = ["--learning-rate", "1e-4", "--scale-lr", "--steps", "4", "--log-steps", "1"]
    whole = trained("lora", "whole", *options, "--train-batch-size", "8")
    assert "learning rate 1e-4 x 8 = 8e-4;" in capfd.readouterr().out
    cut = trained("lora", "cut", *options, "--train-batch-size", "2", "--gradient-accumulation-steps", "4")
    assert "2 a process x 4 accumulated x 1 processes = 8 a step; 4 steps = 32 samples" in capfd.readouterr().out
    assert rates(whole) == rates(cut) == pytest.approx([8e-4] * 4)


def test_rate_is_not_scaled_unless_asked_for(trained, capfd):
    out = trained("lora", "plain", "--learning-rate", "1e-4", "--steps", "1", "--log-steps", "1")
    assert "learning rate 1e-4; " in capfd.readouterr().out
    assert rates(out) == [1e-4]


def test_scaling_is_no_option_that_may_change(places, trained, tmp_path, capfd):
    trained("lora", "run", "--steps", "4")
    capfd.readouterr()
    assert status(command("lora", places, tmp_path / "run", "--steps", "8", "--scale-lr")) == 2
    assert "--scale-lr was False, is True" in capfd.readouterr().err


def test_images_repeats_buckets_and_the_class_are_spelt_out(trained, capfd):
    once = ["--steps", "1", "--train-batch-size", "2"]
    trained("lora", "buckets", *once, "--repeats", "3", "--buckets", "--bucket-step", "8")
    assert "plan: 11 images x 3 repeats, in 1 bucket = 33 an epoch; " in capfd.readouterr().out
    trained("dreambooth", "class", *once, "--num-validation-images", "0")
    said = capfd.readouterr().out
    assert "plan: 11 images x 1 repeats, as many of the class = 22 an epoch; " in said
    assert " = 2 a step, 1 of the subject and 1 of its class; " in said


class Stream:
    """Two parts of ten images."""

    epoch_length, repeats, buckets = 20, 1, ()

    def __init__(self, group):
        self.group, self.images = group, SimpleNamespace(sizes=[10, 10], subjects=1)


def test_the_plan_says_how_a_step_is_shared_and_what_its_warm_up_does():
    cfg = LoraConfig(dataset="d", steps=10)
    assert "1 a step, in turn of the subject and of its class; " in plan.plan(cfg, Stream(1), 10, 1, [1e-4], 5, 0)
    assert "4 a step, 2 of the subject and 2 of its class; " in plan.plan(cfg, Stream(4), 10, 1, [1e-4], 5, 0)
    short = DdpmConfig(dataset="d", steps=100)
    said = plan.plan(short, Stream(4), plan.steps_of(short, Stream(4)), 1, [1e-4], 5, 2)
    assert "learning rate 1e-4 (not reached: its warm-up of 500 steps is longer than the run); " in said
    assert "images are read by 2 processes; " in said


def test_the_number_of_readers_is_as_asked_or_what_the_images_need():
    cfg = LoraConfig(dataset="d", steps=10)
    lazy, asked = (cfg.model_copy(update=more) for more in ({"lazy_cache": True}, {"dataloader_num_workers": 3}))
    assert [cfg.loader_workers(reads) for reads in (True, False)] == [2, 0]
    assert lazy.loader_workers(True) == 0  # the VAE is in the training process
    assert asked.loader_workers(True) == asked.loader_workers(False) == 3
    for workers, told in ((0, "in the training process"), (1, "by 1 process"), (2, "by 2 processes")):
        assert f"images are read {told}; " in plan.plan(cfg, Stream(1), 10, 1, [1e-4], 5, workers)


def test_a_rate_that_an_optimizer_does_not_expect_is_told():
    cfg = LoraConfig(dataset="d", optimizer="prodigy", learning_rate=1e-4)
    assert "learning rate 1e-4 (prodigy finds the rate itself" in plan.plan(cfg, Stream(4), 10, 1, [1e-4], 5, 0)
    cfg = LoraConfig(dataset="d", optimizer="prodigy")
    assert "learning rate 1; " in plan.plan(cfg, Stream(4), 10, 1, [cfg.learning_rate], 5, 0)


@pytest.mark.parametrize("length", [{"steps": 10}, {"num_train_epochs": 2}])
def test_a_warm_up_that_is_longer_than_the_run_is_refused(length):
    cfg = LoraConfig(dataset="d", lr_scheduler="cosine", lr_warmup_steps=10, **length)
    with pytest.raises(UserError, match=r"--lr-warmup-steps 10: the run has 10 steps and would end before"):
        plan.steps_of(cfg, Stream(4))
    assert plan.steps_of(cfg.model_copy(update={"lr_warmup_steps": 9}), Stream(4)) == 10
