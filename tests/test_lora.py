"""``sdtune lora``: the artefact loads in stock diffusers, and trains what it says and nothing else."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdtune.cli import main
from tests.conftest import status

PROMPT = "a red circle"
FILE = "pytorch_lora_weights.safetensors"

KINDS = {
    "alpha, text encoder": ["--rank", "3", "--alpha", "6", "--train-text-encoder", "--text-encoder-lr", "5e-3"],
    "text encoder, dora": ["--train-text-encoder", "--use-dora"],
    "rslora, convolutions": [
        "--use-rslora",
        "--alpha",
        "8",
        "--target-modules",
        "to_k",
        "conv1",
        "proj_in",
        "ff.net.0.proj",
    ],
    "dora, average": ["--use-dora", "--use-ema"],
    "expression": ["--target-modules", r".*attn2\.to_(q|k)"],
}
"""Every kind of adapter, and the pairs of them that are put together in code of their own."""
QUICK = ["--steps", "3", "--learning-rate", "3e-2"]


@pytest.fixture(scope="module")
def untrained(sd):
    return stock(sd)


def stock(sd, run=None):
    pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    if run is not None:
        pipeline.load_lora_weights(run)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    return np.asarray(pipeline(PROMPT, num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0])


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_gives_the_image_of_sdtune_sample(kind, shared, untrained, sd, tmp_path):
    run = shared("lora", *KINDS[kind], *QUICK)
    words = ["sample", "--adapter", str(run), "--prompt", PROMPT, "--steps", "4", "--seed", "5"]
    assert status([*words, "--output-dir", str(tmp_path / "images")]) == 0
    ours = np.asarray(Image.open(tmp_path / "images" / "00000.png"))
    assert np.array_equal(ours, stock(sd, run))
    assert not np.array_equal(ours, untrained), "the adapter changes nothing"


def test_keys_and_metadata_are_the_published_ones(shared):
    run = shared("lora", *KINDS["alpha, text encoder"], *QUICK)
    with safe_open(run / FILE, framework="pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    unet = {k.rpartition(".lora.")[2] for k in keys if k.startswith("unet.")}
    text = {k.rpartition(".lora_linear_layer.")[2] for k in keys if k.startswith("text_encoder.text_model.encoder.")}
    assert unet == text == {"down.weight", "up.weight"}
    assert all(k.startswith(("unet.", "text_encoder.text_model.")) for k in keys)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"], config["text_encoder.r"]) == (3, 6.0, 3)
    assert json.loads(metadata["sdtune"])["base"]


def test_the_same_run_gives_the_same_bytes(shared, lora):
    one, other = shared("lora"), lora("other")
    assert (one / FILE).read_bytes() == (other / FILE).read_bytes()


def test_average_is_exported_and_differs_from_the_last_weights(shared):
    plain, average = (load_file(shared("lora", *more, "--steps", "4") / FILE) for more in ([], ["--use-ema"]))
    assert any(not torch.equal(plain[k], average[k]) for k in plain)


def test_training_lowers_the_loss_of_held_out_images(lora):
    run = lora("run", "--steps", "60", "--num-holdout-images", "3", "--validation-steps", "20", "--rank", "8")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["holdout_loss"] for line in lines if "holdout_loss" in line]
    assert len(held_out) == 4
    assert held_out[-1] < 0.95 * held_out[0]


def test_gradient_checkpointing_changes_nothing_but_memory(shared, lora):
    few = ["--steps", "4"]
    one = load_file(shared("lora", *few) / FILE)
    other = load_file(lora("other", "--gradient-checkpointing", *few) / FILE)
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-6


def test_cached_and_uncached_agree(lora):
    options = ["--random-flip", "--steps", "4"]
    one, other = load_file(lora("one", *options) / FILE), load_file(lora("other", "--no-cache", *options) / FILE)
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-4


def test_init_adapter_goes_on_from_a_file(shared, lora, capsys):
    first = shared("lora")
    options = ["--steps", "1", "--init-adapter", str(first), "--learning-rate", "1e-12", "--adam-weight-decay", "0"]
    second = lora("second", *options)
    one, other = load_file(first / FILE), load_file(second / FILE)
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-8
    assert status_of_lora(lora, "third", "--init-adapter", str(first), "--rank", "2") == 2
    assert "rank" in capsys.readouterr().err


def status_of_lora(lora, name, *options):
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        lora(name, *options)
    return 2


def test_single_file_base_is_refused_with_a_reason_when_it_is_no_checkpoint(lora, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\0" * 64)
    status_of_lora(lora, "run", "--model", str(file))
    assert "not a safetensors file" in capsys.readouterr().err


def test_another_base_is_not_silently_half_adapted(shared, sd, tmp_path, capsys):
    """Diffusers loads an adapter whose modules the base does not have without a word."""
    run = shared("lora")
    tensors = {k.replace("attn1", "attn9"): v for k, v in load_file(run / FILE).items()}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "strange.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        main(["sample", "--model", str(sd), "--adapter", str(tmp_path / "strange.safetensors"), "--prompt", "x"])
    assert ended.value.code == 2
    assert "strange.safetensors" in capsys.readouterr().err
