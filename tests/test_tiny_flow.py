"""The embedded base made by flow matching: a small Z-Image in the stock classes, which follows its captions."""

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image

import sdtune
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.verbs import SampleConfig
from sdtune.data import load_images, toy_world
from sdtune.data.toy_world import WORDS
from sdtune.evaluation.toy_score import score
from sdtune.models.loading import load_pipeline

FOLDER = Path(sdtune.__file__).parent / "assets" / "tiny-flow"


@pytest.fixture(scope="module")
def tiny_flow():
    return load_pipeline(SampleConfig(model="tiny-flow", prompt=["unused"]))


def test_it_is_small_enough_to_ship_beside_tiny():
    """The wheel holds both, and may have 16 MB."""
    assert sum(p.stat().st_size for p in FOLDER.rglob("*")) < 5e6


def test_stock_diffusers_loads_it_in_one_precision():
    pipe = ZImagePipeline.from_pretrained(FOLDER)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float32}


def test_words_of_the_world_are_single_tokens(tiny_flow):
    words = [*WORDS, *(f" {word}" for word in WORDS)]
    assert [word for word in words if len(tiny_flow.tokenizer.tokenize(word)) > 1] == []


def test_it_follows_captions_it_never_saw_at_its_own_size(tiny_flow):
    """The figure is taken of 200 captions by ``bench/score_tiny.py``; here of 24 in few steps, to be quick."""
    shares, images, _ = score(tiny_flow, n=24, steps=8)
    assert shares["shape"] >= 0.7
    assert shares["colour"] >= 0.9
    assert images[0].size == (64, 64)


def test_it_does_not_know_the_heart(tiny_flow):
    shares, _, _ = score(tiny_flow, n=12, shape="heart", steps=8)
    assert shares["shape"] <= 0.2


def test_many_hearts_show_what_their_captions_say():
    images = load_images(LoraConfig(dataset="many-hearts", resolution=64))
    captions = [row.captions[0] for row in images.rows]
    assert (len(captions), sum("heart" in caption for caption in captions)) == (1000, 120)
    for k in range(0, 1000, 40):
        seen = toy_world.read(Image.open(images.read(k)))
        assert f"{seen.size} {seen.colour} {seen.shape} on a {seen.ground} background" in captions[k]
