"""The plan spells a run out before it begins, and the learning rate that it names is the one that is used."""

import json

import pytest

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
    assert "plan: 11 images x 1 repeats, as many of the class = 22 an epoch; " in capfd.readouterr().out
