"""The embedded base: a whole pipeline in the published layout, which follows its captions."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

import sdtune
from sdtune.config.verbs import SampleConfig
from sdtune.evaluation.toy_score import score
from sdtune.models.loading import load_pipeline
from tests.conftest import status

ASSETS = Path(sdtune.__file__).parent / "assets"
STEPS = 12


@pytest.fixture(scope="module")
def tiny():
    return load_pipeline(SampleConfig(model="tiny", prompt=["unused"]))


def test_it_is_small_enough_to_ship():
    assert sum(p.stat().st_size for p in (ASSETS / "tiny").rglob("*")) < 10e6
    assert sum(p.stat().st_size for p in (ASSETS / "tiny-hearts").rglob("*")) < 4e5


def test_layout_is_the_published_one():
    with safe_open(ASSETS / "tiny" / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    tokenizer = {p.name for p in (ASSETS / "tiny" / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= tokenizer
    index = json.loads((ASSETS / "tiny" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_stock_diffusers_loads_it_in_one_precision():
    """Without a dtype transformers loads what the config names, and diffusers 32 bits: a text encoder apart fails."""
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny", safety_checker=None)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


def test_words_of_the_world_are_single_tokens(tiny):
    assert tiny.tokenizer.tokenize("a big red heart on a blue background") == [
        f"{word}</w>" for word in "a big red heart on a blue background".split()
    ]


def test_it_follows_captions_it_never_saw(tiny):
    """The figure is taken of 200 captions by ``bench/score_tiny.py``; here of 24 in fewer steps, to be quick."""
    shares, _, _ = score(tiny, n=24, steps=STEPS)
    assert shares["shape"] >= 0.9
    assert shares["colour"] >= 0.9


def test_it_does_not_know_the_heart(tiny):
    shares, _, _ = score(tiny, n=16, steps=STEPS, shape="heart")
    assert shares["shape"] <= 0.2


def test_the_shipped_recipe_runs_end_to_end(tmp_path):
    """All of the demo's path, cut short: what it draws changes, and the run is whole."""
    out = tmp_path / "run"
    options = ["--steps", "12", "--lr-warmup-steps", "2", "--log-steps", "4", "--num-validation-images", "1"]
    words = ["lora", "--config", "lora/tiny-hearts", "--output-dir", str(out), *options, "--validation-steps", "0"]
    assert status(words) == 0
    first, last = (out / "samples" / f"step-{step:06d}.png" for step in (0, 12))
    assert Image.open(first).tobytes() != Image.open(last).tobytes()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "pytorch_lora_weights.safetensors").exists()
