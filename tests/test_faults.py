"""What goes wrong gets one line that names it and the way out, exit code 2, and costs nothing."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtune.run import checkpoints
from tests import ranks
from tests.compare import assert_same_bits
from tests.conftest import command, status


@pytest.fixture
def refused(sd, pictures, tmp_path, capfd):
    """Run ``sdtune lora`` with options that must be refused; what it said, and that it wrote no artefact."""

    def run(*options, out=None):
        out = out or tmp_path / "run"
        capfd.readouterr()
        assert status(command(sd, pictures, out, *options)) == 2
        said = capfd.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        assert not list(out.glob("*.safetensors")) if out.is_dir() else True
        return said

    return run


# ---- model ---------------------------------------------------------------------------------------------


def test_model_folder_that_is_no_pipeline(refused, tmp_path):
    assert "model_index.json" in refused("--model", str(tmp_path))


def test_model_that_is_not_there(refused, tmp_path):
    assert "no such folder" in refused("--model", str(tmp_path / "nothing"))


def test_mistyped_built_in_model(refused):
    assert "did you mean tiny" in refused("--model", "tinny")


@pytest.mark.fault("A model file is a pickle", "Refused unread.")
@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt"])
def test_pickle_is_refused_unread(refused, tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    assert "pickle" in refused("--model", str(tmp_path / name))


def test_model_without_text_encoder(refused, sd, tmp_path):
    index = json.loads((sd / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    assert "text_encoder" in refused("--model", str(tmp_path / "model"))


def test_model_of_an_unknown_kind(refused, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    assert "PixArtAlphaPipeline" in refused("--model", str(tmp_path))


def test_inpainting_model(refused, sd, tmp_path):
    copy = shutil.copytree(sd, tmp_path / "model")
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps(config | {"latent_channels": 5}))
    assert "channels" in refused("--model", str(copy))


@pytest.mark.fault("Weights of the base are damaged", "Refused with the part that is.")
def test_damaged_weights_name_the_part(refused, sd, tmp_path):
    copy = shutil.copytree(sd, tmp_path / "model")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert "unet" in refused("--model", str(copy))


@pytest.mark.fault("Adapters would go on no layer", "Refused, with the names that there are.")
def test_target_modules_that_match_nothing(refused):
    said = refused("--target-modules", "to_nothing")
    assert "--target-modules to_nothing" in said
    assert "to_q" in said


def test_expression_that_is_none(refused):
    assert "--target-modules" in refused("--target-modules", "to_(q")


def test_resolution_that_the_vae_cannot_halve(refused):
    assert "multiple of 2" in refused("--resolution", "33")


def test_zero_snr_with_an_epsilon_base(refused):
    assert "--prediction-type v_prediction" in refused("--rescale-betas-zero-snr")


def test_precision_that_the_launcher_was_told_otherwise(refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "accelerate launch sets bf16" in refused("--mixed-precision", "fp16")


def test_compile_on_a_cpu(refused):
    assert "wrong gradients" in refused("--compile")


@pytest.mark.parametrize("name", ["adamw9", "torch.optim:AdamV", "nothing_here:At"])
def test_unknown_optimizer(refused, name):
    assert f"--optimizer {name}" in refused("--optimizer", name)


def test_tracker_that_is_not_installed(refused):
    assert "--report-to aim" in refused("--report-to", "aim")


# ---- data ----------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "An image is cut short", "Refused by its name before the first step, or left out with `--on-bad-image skip`."
)
def test_truncated_image_is_named_and_can_be_skipped(refused, lora, pictures, tmp_path, capfd):
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    whole = (copy / "03.png").read_bytes()
    (copy / "03.png").write_bytes(whole[: len(whole) // 2])
    assert "03.png" in refused("--dataset", str(copy))
    lora("skipping", "--dataset", str(copy), "--on-bad-image", "skip", "--steps", "1")
    assert "03.png" in capfd.readouterr().out


SPOIL = """
from pathlib import Path
from sdtune.recipes.lora import Lora

class Spoil(Lora):
    def dataset(self, group, log):
        found = super().dataset(group, log)
        for file in Path(self.cfg.dataset).glob("*.png"):
            file.write_bytes(b"gone")
        return found
"""


@pytest.mark.fault("An image goes bad while the run trains", "Exit code 2 and one line with its name.")
def test_image_that_goes_bad_while_training(sd, pictures, tmp_path, capfd):
    """It was whole when it was checked; a loader's worker meets it, and the message is still one line."""
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "spoil.py").write_text(SPOIL)
    options = ["--dataset", str(copy), "--no-cache", "--dataloader-num-workers", "1"]
    words = command(sd, copy, tmp_path / "run", *options)
    assert status(["run", str(tmp_path / "spoil.py"), *words[1:]]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert ".png could be read when training began" in said


@pytest.mark.fault(
    "Captions are longer than the text encoder reads", "They are counted; the longest are named, with what one loses."
)
def test_long_captions_are_counted(lora, pictures, tmp_path, capfd):
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    with (copy / "metadata.jsonl").open("a") as lines:
        Image.new("RGB", (40, 40)).save(copy / "long.png")
        lines.write(json.dumps({"file_name": "long.png", "text": "red circle " * 60}) + "\n")
    lora("run", "--dataset", str(copy), "--steps", "1")
    said = capfd.readouterr().out
    assert "captions over the text encoder's 77 tokens: 1, 45 tokens lost (longest long.png: 122)" in said
    assert "long.png loses: circle red circle red" in said


def test_fewer_images_than_a_batch(lora, pictures, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(pictures / "00.png", one)
    lora("run", "--dataset", str(one), "--caption", "a red circle", "--train-batch-size", "4", "--steps", "1")


# ---- the run's folder ----------------------------------------------------------------------------------


@pytest.mark.fault("The output folder is a file", "Refused before the model loads.")
def test_output_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(out=tmp_path / "file")
    assert "is a file" in refused(out=tmp_path / "file" / "below")


@pytest.mark.fault("The output folder cannot be written", "Refused before the model loads.")
def test_output_that_cannot_be_written(refused):
    assert "cannot be written" in refused(out=Path("/proc/sdtune"))


@pytest.mark.fault(
    "The folder holds a run with other options", "Refused with each option that differs; the run stays as it is."
)
def test_run_of_another_config_names_the_options_and_stays(copied, lora, capfd):
    artefact = copied("lora", "run") / "pytorch_lora_weights.safetensors"
    before = artefact.read_bytes()
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        lora("run", "--rank", "8", "--seed", "3")
    said = capfd.readouterr().err
    assert "--rank was 4, is 8" in said
    assert "--seed was 0, is 3" in said
    assert artefact.read_bytes() == before


def test_overwrite_discards_the_run_and_nothing_else(copied, lora, tmp_path):
    copied("lora", "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    lora("run", "--overwrite", "--rank", "8", "--steps", "1")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert "rank: 8" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.fault("Images or captions changed since the run began", "Refused; `--allow-change` continues.")
def test_changed_data_is_noticed(lora, pictures, tmp_path, capfd):
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    lora("run", "--dataset", str(copy), "--steps", "1")
    Image.new("RGB", (40, 40), "blue").save(copy / "04.png")
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        lora("run", "--dataset", str(copy), "--steps", "2")
    assert "--allow-change" in capfd.readouterr().err
    lora("run", "--dataset", str(copy), "--steps", "2", "--allow-change")


def test_another_number_of_images_per_step(copied, lora, capfd):
    copied("lora", "run", "--steps", "4")
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        lora("run", "--steps", "8", "--train-batch-size", "3")
    assert "2 images" in capfd.readouterr().err


def test_finished_run_is_left_alone(copied, lora, capfd):
    run = copied("lora", "run")
    before = (run / "metrics.jsonl").read_bytes()
    lora("run")
    assert "already" in capfd.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


# ---- checkpoints ---------------------------------------------------------------------------------------


def damage(folder, how):
    weights = folder / "weights.safetensors"
    match how:
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "one bit":
            content = bytearray(weights.read_bytes())
            content[-5] ^= 1
            weights.write_bytes(content)
        case "file missing":
            weights.unlink()
        case "manifest missing":
            (folder / "manifest.json").unlink()


@pytest.mark.fault(
    "A bit, the end or a file of a checkpoint is lost",
    "It is passed over with its reason; the one before it continues to the same bits.",
)
def test_damaged_checkpoint_is_passed_over(shared, lora, tmp_path, capfd):
    ways = ["cut short", "one bit", "file missing", "manifest missing"]
    often = ["--checkpointing-steps", "1", "--checkpoints-total-limit", "9"]
    lora("cut", *often, "--steps", "5")
    for step, how in enumerate(ways, start=2):
        damage(tmp_path / "cut" / "checkpoints" / f"step-{step:06d}", how)
    capfd.readouterr()
    cut = lora("cut", *often)
    said = capfd.readouterr().out
    assert said.count("skipped a damaged checkpoint") == len(ways)
    assert "continuing at step 1" in said
    assert_same_bits(shared("lora"), cut)


@pytest.mark.fault("No checkpoint is whole", "Refused, each with its reason; only `--overwrite` starts anew.")
def test_never_starts_anew_when_no_checkpoint_is_whole(copied, lora, tmp_path, capfd):
    copied("lora", "run")
    for folder in checkpoints.found(tmp_path / "run" / "checkpoints"):
        damage(folder, "one bit")
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        lora("run")
    said = capfd.readouterr().err
    assert said.count("does not match its checksum") == 2
    assert "--overwrite" in said


@pytest.mark.fault(
    "SIGTERM, or Ctrl-C", "A checkpoint is saved, the command that continues is printed; exit code 128 + the signal."
)
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_first(number, shared, sd, pictures, tmp_path):
    options = ["--checkpointing-steps", "0", "--log-steps", "1"]
    out = tmp_path / "cut"
    words = command(sd, pictures, out, *options)
    metrics = out / "metrics.jsonl"
    begun = lambda: metrics.exists() and metrics.stat().st_size > 50  # noqa: E731
    code, said = ranks.interrupt(words, tmp_path / "output", number, begun)
    assert code == 128 + number
    assert "continue with: sdtune lora" in said
    assert len(checkpoints.found(out / "checkpoints")) == 1
    assert status(words) == 0
    assert_same_bits(shared("lora"), out)


@pytest.mark.fault(
    "The disk is full while a checkpoint is saved",
    "Exit code 1 with the bytes needed and free; older checkpoints stay, and the same command continues.",
)
def test_full_disk_costs_the_run_nothing(shared, lora, tmp_path, monkeypatch, capfd):
    """The second checkpoint meets a full disk; what was saved stays, and the same command goes on."""
    real = checkpoints.save_file

    def full(tensors, path):
        if "000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(AssertionError, match="assert 1 == 0"):
        lora("cut")
    assert "MB are free" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.setattr(checkpoints, "save_file", real)
    assert_same_bits(shared("lora"), lora("cut"))


@pytest.mark.fault("The disk is too small for the checkpoints", "Refused before the first step.")
def test_disk_too_small_for_the_checkpoints_is_said_before_step_0(refused, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert "MB are free" in refused()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.fault("The disk of the cache is full", "Refused with the way out; no file is left half written.")
def test_full_disk_of_the_cache_leaves_nothing_half_written(refused, monkeypatch, tmp_path):
    def full(tensors, path, *more):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sdtune.run.files.save_file", full)
    assert "--no-cache" in refused()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix in (".tmp", ".safetensors")]


# ---- numbers that are none -----------------------------------------------------------------------------

POISON = """
import torch
from sdtune.recipes.lora import Lora

class Poisoned(Lora):
    '''LoRA whose loss is not a number for one image.'''

    def forward(self, batch):
        loss = super().forward(batch)
        return loss * torch.where(batch["u"] > ({above}), torch.nan, 1.0)

    def after_step(self):
        RUN.step += 1

class RUN:
    step = 0
"""


@pytest.fixture
def poisoned(sd, pictures, tmp_path):
    def run(above, *options):
        file = tmp_path / f"poison{abs(hash(above))}.py"
        file.write_text(POISON.format(above=above))
        words = command(sd, pictures, tmp_path / "run", *options)
        return status(["run", str(file), *words[1:]])

    yield run
    for name in [n for n in sys.modules if n.startswith("poison")]:
        del sys.modules[name]


@pytest.mark.fault(
    "A loss or gradient is not finite", "The step is skipped and counted, its images are named; weights stay finite."
)
def test_steps_without_finite_gradient_are_skipped_counted_and_named(poisoned, tmp_path, capfd):
    assert poisoned(0.8, "--steps", "20", "--max-bad-steps", "20") == 0
    said = capfd.readouterr().out
    assert "were skipped" in said
    assert ".png" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["skipped_steps"] < 20
    groups, _ = checkpoints.load(checkpoints.found(tmp_path / "run" / "checkpoints")[-1])
    assert all(t.isfinite().all() for named in groups.values() for t in named.values())


@pytest.mark.fault("Many steps in a row are not finite", "Exit code 1; no artefact is written.")
def test_too_many_bad_steps_end_the_run(poisoned, tmp_path, capfd):
    assert poisoned(-1, "--steps", "20", "--max-bad-steps", "4") == 1
    assert "4 steps in a row" in capfd.readouterr().err
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.fault("The last step of a run is not finite", "Exit code 1, and no artefact is written.")
def test_a_run_whose_last_steps_were_all_skipped_fails(poisoned, tmp_path, capfd):
    """From step 4 on, less than --max-bad-steps before the end."""
    assert poisoned("-1 if RUN.step >= 4 else 2", "--steps", "8", "--checkpointing-steps", "4") == 1
    said = capfd.readouterr().err
    assert "failed: step 8: no finite gradient for 4 steps in a row" in said
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000004"]


@pytest.mark.fault("In fp16 no step of a run is finite", "Exit code 1, and no artefact is written.")
def test_a_run_in_fp16_that_never_took_a_step_fails(poisoned, tmp_path, capfd):
    """It is shorter than --max-bad-steps, and longer than none: a scale that is found later would be fine."""
    half = ["--mixed-precision", "fp16", "--max-bad-steps", "50", "--steps"]
    assert poisoned(-1, *half, "3") == 1
    assert "failed: step 3: no finite gradient for 3 steps in a row" in capfd.readouterr().err
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.fault("Weights grow beyond what fp16 holds", "Exit code 1; nothing is saved or exported after it.")
def test_weights_that_have_grown_without_bounds_are_not_exported(lora, sd, pictures, tmp_path, capfd):
    words = command(sd, pictures, tmp_path / "run", "--steps", "1", "--learning-rate", "1e30")
    assert status(words) == 1
    assert "failed: step 1: the weights have grown to 1e+30: training has diverged" in capfd.readouterr().err
    assert list((tmp_path / "run").rglob("*.safetensors")) == []


@pytest.mark.fault("The base holds NaN", "Refused with the part that does, before the first step.")
def test_a_base_that_holds_nan_is_refused_before_training(refused, sd, tmp_path):
    base = shutil.copytree(sd, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"][0] = float("nan")
    save_file(tensors, file)
    assert "unet: 36 numbers in 1 tensors are NaN or infinite" in refused("--model", str(base))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_longer_run_whose_rate_jumps_is_told(lora, capfd):
    lora("run", "--steps", "4", "--lr-scheduler", "cosine")
    capfd.readouterr()
    lora("run", "--steps", "8", "--lr-scheduler", "cosine")
    jump = "the run was to end at step 4 and now ends at 8: under cosine its learning rate jumps at step 4 from 0 to"
    assert f"{jump} 0.5 of the peak" in capfd.readouterr().out
    lora("flat", "--steps", "2")
    lora("flat", "--steps", "4")
    assert "was to end at" not in capfd.readouterr().out


# ---- secrets -------------------------------------------------------------------------------------------


@pytest.mark.fault("An access token is in the environment", "No file of the run holds it.")
def test_no_token_is_written(lora, monkeypatch, tmp_path):
    token = "hf_" + "planted" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    run = lora("run", "--report-to", "tensorboard", "--steps", "2")
    files = [p for p in run.rglob("*") if p.is_file()]
    assert any(p.name.startswith("events.out") for p in files)
    assert [p for p in files if token.encode() in p.read_bytes()] == []
    assert os.environ["HF_TOKEN"] == token
