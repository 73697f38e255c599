"""Steps on many processes and in half precision: what is sharded learns the same, what overflows is skipped."""

import json
import shutil

import pytest
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from sdtune.config.methods.lora import LoraConfig
from sdtune.run.checkpoints import found
from sdtune.training import engine, optim
from tests import ranks
from tests.compare import difference
from tests.conftest import status
from tests.contract import RECIPES, command
from tests.test_cuts import WHOLE

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CUT = ["--train-batch-size", "2", "--gradient-accumulation-steps", "2"]


PROCESSES = {"ddpm": [2, 1, 2], "progressive": [2, 1, 2], "dreambooth": [2, 1], "lcm": [2]}
"""How many processes go on with a run of each recipe, one after the other; slices of a weight take their time."""


@pytest.mark.processes
@pytest.mark.parametrize("recipe", PROCESSES)
def test_sharded_is_the_same_run(recipe, shared, trained, places, tmp_path):
    """Two processes that hold half of each weight, then one, then two again learn what one process learns."""
    contract, out = RECIPES[recipe], tmp_path / "sharded"
    whole = contract.artefact(shared(recipe, *contract.draws, *WHOLE))
    words = command(recipe, places, out, *contract.draws, *CUT, *contract.previews, "--export-steps", "2")
    _, *others = PROCESSES[recipe]
    printed = ranks.train(2, [*words, "--steps", "2" if others else "4"], tmp_path / "first", **FSDP)
    assert "each in 2 slices" in printed
    saved = found(out / "checkpoints")[-1]
    weights, moments = load_file(saved / "weights.safetensors"), load_file(saved / "optimizer.safetensors")
    assert all(moments[f"{name}|exp_avg"].shape == weight.shape for name, weight in weights.items())
    assert (out / "exports" / "step-000002").is_dir()
    if others:
        last = "4" if others == [1] else "3"
        trained(recipe, "sharded", *contract.draws, "--train-batch-size", "8", "--steps", last)
    if others == [1, 2]:
        assert "continuing at step 3" in ranks.train(2, [*words, "--steps", "4"], tmp_path / "last", **FSDP)
    assert difference(whole, contract.artefact(out)) < 1e-6
    kinds = [json.loads(file.read_text())["_class_name"] for file in out.glob("unet/config.json")]
    assert all(kind.startswith("UNet2D") for kind in kinds)  # not the class that FSDP makes of it


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_overflow_is_skipped_counted_and_moves_no_schedule(trained, monkeypatch):
    monkeypatch.setattr(engine, "INIT_SCALE", 2.0**26)  # times what adapters of this model get, more than fp16 holds
    half = ["--mixed-precision", "fp16", "--lr-scheduler", "linear", "--log-steps", "1"]
    out = trained("lora", "half", *half, "--steps", "12")
    skipped = [line["skipped_steps"] for line in lines_of(out) if "loss" in line]
    assert skipped[0] > 0 and skipped[-1] < 10  # the scale is found
    rate = optim.lr_schedule(LoraConfig(dataset="d", lr_scheduler="linear"), 12)
    before = [0, *skipped[:-1]]
    wanted = [1e-2 * rate(step - missed) for step, missed in enumerate(before)]
    assert [line["learning_rate"] for line in lines_of(out) if "loss" in line] == pytest.approx(wanted)
    scaler = json.loads((found(out / "checkpoints")[-1] / "state.json").read_text())["scaler"]
    assert scaler["scale"] == 2.0**26 / 2 ** skipped[-1]
    steps = load_file(found(out / "checkpoints")[-1] / "optimizer.safetensors")
    assert {int(t) for name, t in steps.items() if name.endswith("|step")} == {12 - skipped[-1]}
    trained("lora", "parts", *half, "--steps", str(skipped[-1] + 1))  # a run that takes no step at all fails
    parts = trained("lora", "parts", *half, "--steps", "12")
    assert lines_of(parts)[-1]["skipped_steps"] == skipped[-1]
    assert difference(RECIPES["lora"].artefact(out), RECIPES["lora"].artefact(parts)) == 0


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_that_fp16_cannot_hold_is_computed_in_fp32(upcast, places, tmp_path, capfd):
    """As that of SDXL, whose configuration says so; images that are read, and images that are shown."""
    base = shutil.copytree(places.sd, tmp_path / "base")
    vae = AutoencoderKL.from_pretrained(base / "vae")
    vae.register_to_config(force_upcast=upcast)
    for part in (vae.encoder, vae.decoder):
        part.conv_in.weight.data *= 1e5  # a norm behind it makes it good, in fp32
    vae.save_pretrained(base / "vae")
    half = ["--mixed-precision", "fp16", "--no-cache", "--steps", "2", "--log-steps", "1", "--model", str(base)]
    more = ["--num-validation-images", "1", "--validation-inference-steps", "2"]
    # Without a finite loss no step is taken, and the run fails
    assert status(command("lora", places, tmp_path / "run", *half, *more)) == (0 if upcast else 1)
    losses = [line["loss"] for line in lines_of(tmp_path / "run") if "loss" in line]
    assert ("no finite loss in batches" in capfd.readouterr().out) is not upcast
    assert [loss is not None for loss in losses] == ([True] * 2 if upcast else [False])
    shown = Image.open(next((tmp_path / "run" / "samples").glob("*.png"))).convert("L")
    assert (shown.histogram()[0] < 32 * 32 / 2) is upcast  # what is not finite is shown black


WAYS = {
    "replicated": {},
    "slices": FSDP,
}


@pytest.mark.processes
@pytest.mark.parametrize("way", WAYS)
def test_overflow_of_many_processes_is_that_of_all(way, places, tmp_path, monkeypatch):
    """Skipped by each of them, counted once, and the scale goes on from a checkpoint."""
    monkeypatch.setattr(engine, "INIT_SCALE", 2.0**26)
    half = ["--mixed-precision", "fp16", "--lr-scheduler", "linear", "--log-steps", "1", "--train-batch-size", "1"]

    def run(name, steps):
        words = command("lora", places, tmp_path / name, *half, "--steps", steps)
        ranks.train(2, words, tmp_path / f"{name}-output", **WAYS[way])
        return [line for line in lines_of(tmp_path / name) if "loss" in line]

    def scaler(name):
        return json.loads((found(tmp_path / name / "checkpoints")[-1] / "state.json").read_text())["scaler"]

    lines = run("whole", "12")
    skipped = [line["skipped_steps"] for line in lines]
    assert skipped[0] > 0 and skipped[-1] < 12
    rate = optim.lr_schedule(LoraConfig(dataset="d", lr_scheduler="linear"), 12)
    wanted = [1e-2 * rate(step - missed) for step, missed in enumerate([0, *skipped[:-1]])]
    assert [line["learning_rate"] for line in lines] == pytest.approx(wanted)
    assert scaler("whole")["scale"] == 2.0**26 / 2 ** skipped[-1]
    if way == "slices":  # a checkpoint of slices is that of whole weights, which other tests continue
        return
    run("parts", str(skipped[-1] + 1))
    assert run("parts", "12")[-1]["skipped_steps"] == skipped[-1]
    assert scaler("parts") == scaler("whole")
    whole, parts = (RECIPES["lora"].artefact(tmp_path / name) for name in ("whole", "parts"))
    assert difference(whole, parts) == 0


@pytest.mark.parametrize(("recipe", "precision"), [("dreambooth", "fp16"), ("ddpm", "bf16")])
def test_half_precision_trains_float32_weights(recipe, precision, shared, trained):
    contract = RECIPES[recipe]
    half = trained(recipe, "half", *contract.draws, *WHOLE, "--mixed-precision", precision)
    ours, theirs = contract.artefact(half), contract.artefact(shared(recipe, *contract.draws, *WHOLE))
    assert {t.dtype.itemsize for t in ours.values()} == {4}
    assert 0 < difference(ours, theirs) < 1e-2
