"""Steps on many processes and in half precision: what is sharded learns the same, what overflows is skipped."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from sdtune import engine, optim
from sdtune.checkpoints import found
from sdtune.methods import LoraConfig
from tests.contract import RECIPES, command
from tests.test_cuts import difference

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CUT = ["--train-batch-size", "2", "--gradient-accumulation-steps", "2"]


def run(words, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "sdtune", *words], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("recipe", ["lora", "dreambooth", "ddpm"])
def test_sharded_is_the_same_run(recipe, trained, places, tmp_path):
    """Two processes that hold half of each weight, then one, then two again learn what one process learns."""
    contract, out = RECIPES[recipe], tmp_path / "sharded"
    whole = contract.artefact(trained(recipe, "whole", *contract.draws, "--train-batch-size", "8"))
    words = command(recipe, places, out, *contract.draws, *CUT, *contract.previews, "--export-steps", "2")
    told = run([*words, "--num-processes", "2", "--steps", "4"], **FSDP)
    assert "each in 2 slices" in told
    saved = found(out / "checkpoints")[-1]
    weights, moments = load_file(saved / "weights.safetensors"), load_file(saved / "optimizer.safetensors")
    assert all(moments[f"{name}|exp_avg"].shape == weight.shape for name, weight in weights.items())
    assert (out / "exports" / "step-000002").is_dir()
    trained(recipe, "sharded", *contract.draws, "--train-batch-size", "8", *contract.previews, "--steps", "8")
    assert "continuing at step 8" in run([*words, "--num-processes", "2"], **FSDP)
    assert difference(whole, contract.artefact(out)) < 1e-6
    kinds = [json.loads(file.read_text())["_class_name"] for file in out.glob("unet/config.json")]
    assert all(kind.startswith("UNet2D") for kind in kinds)  # not the class that FSDP makes of it


@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("recipe", ["lora", "text-to-image"])
def test_deepspeed_is_the_same_run(recipe, stage, trained, places, tmp_path):
    """Two processes under ZeRO, then one without, then two again."""
    pytest.importorskip("deepspeed")
    contract, out = RECIPES[recipe], tmp_path / "zero"
    options = ["--learning-rate", "1e-5", "--random-flip", *contract.previews]
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage, "DS_ACCELERATOR": "cpu"}
    whole = contract.artefact(trained(recipe, "whole", *options, "--train-batch-size", "8"))
    words = command(recipe, places, out, *options, *CUT)
    told = run([*words, "--num-processes", "2", "--steps", "4"], **zero)
    assert f"ZeRO-{stage}" in told
    trained(recipe, "zero", *options, "--train-batch-size", "8", "--steps", "8")
    assert "continuing at step 8" in run([*words, "--num-processes", "2"], **zero)
    assert difference(whole, contract.artefact(out)) < 1e-6


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_overflow_is_skipped_counted_and_moves_no_schedule(trained, monkeypatch):
    monkeypatch.setattr(engine, "INIT_SCALE", 2.0**26)  # times what adapters of this model get, more than fp16 holds
    half = ["--mixed-precision", "fp16", "--lr-scheduler", "linear", "--log-steps", "1"]
    out = trained("lora", "half", *half)
    skipped = [line["skipped_steps"] for line in lines_of(out) if "loss" in line]
    assert skipped[0] > 0 and skipped[-1] < 10  # the scale is found
    rate = optim.learning_rate(LoraConfig(dataset="d", lr_scheduler="linear"), 12)
    before = [0, *skipped[:-1]]
    wanted = [1e-2 * rate(step - missed) for step, missed in enumerate(before)]
    assert [line["learning_rate"] for line in lines_of(out) if "loss" in line] == pytest.approx(wanted)
    scaler = json.loads((found(out / "checkpoints")[-1] / "state.json").read_text())["scaler"]
    assert scaler["scale"] == 2.0**26 / 2 ** skipped[-1]
    steps = load_file(found(out / "checkpoints")[-1] / "optimizer.safetensors")
    assert {int(t) for name, t in steps.items() if name.endswith("|step")} == {12 - skipped[-1]}
    trained("lora", "parts", *half, "--steps", "3")  # in the midst of the overflows, or soon after
    parts = trained("lora", "parts", *half, "--steps", "12")
    assert lines_of(parts)[-1]["skipped_steps"] == skipped[-1]
    assert difference(RECIPES["lora"].artefact(out), RECIPES["lora"].artefact(parts)) == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("recipe", ["dreambooth", "ddpm"])
def test_half_precision_trains_float32_weights(recipe, precision, trained):
    contract = RECIPES[recipe]
    half = trained(recipe, "half", *contract.draws, "--mixed-precision", precision)
    whole = trained(recipe, "whole", *contract.draws)
    ours, theirs = contract.artefact(half), contract.artefact(whole)
    assert {t.dtype.itemsize for t in ours.values()} == {4}
    assert 0 < difference(ours, theirs) < 1e-2
