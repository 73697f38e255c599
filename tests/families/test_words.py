"""A new word in a base of several text encoders: vectors of its own in each, as stock diffusers reads them."""

import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from sdtune.run.usage import EMBEDDING
from tests.conftest import status

PROMPT = "a red <thing>"
WORD = ["--placeholder-token", "<thing>", "--num-vectors", "2"]
METHODS = {
    "textual-inversion": [*WORD, "--learning-rate", "0.5", "--initializer-token", "red", "--norm-weight", "0.01"],
    "dreambooth": [
        *(*WORD, "--lora", "--train-text-encoder", "--caption", "a <thing>"),
        *("--learning-rate", "1e-2", "--placeholder-lr", "0.5"),
    ],
}


def command(method, base, pictures, out, *options):
    words = [method, "--model", str(base), "--dataset", str(pictures), "--output-dir", str(out), "--resolution", "32"]
    words += ["--steps", "4", "--train-batch-size", "1", "--dataloader-num-workers", "0", "--log-steps", "2"]
    words += ["--num-validation-images", "2", "--validation-inference-steps", "1", "--validation-prompt", PROMPT]
    return [*words, *METHODS[method], *options]


def pixels(image):
    return np.asarray(image).astype(int)


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(5)
    return pixels(
        pipe(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=noise, height=32, width=32).images[0]
    )


@pytest.mark.parametrize("method", METHODS)
def test_sdxl_learns_a_word_in_both_encoders(method, bases, pictures, tmp_path, capsys):
    base, run = bases("sdxl"), tmp_path / "run"
    assert status(command(method, base, pictures, run)) == 0
    vectors = load_file(run / EMBEDDING)
    assert {name: tuple(table.shape) for name, table in vectors.items()} == {"clip_l": (2, 32), "clip_g": (2, 32)}
    assert all(not torch.equal(table[0], table[1]) for table in vectors.values()), "a table did not train"
    assert "embedding_norm_2" in (run / "metrics.jsonl").read_text()

    kind = "--adapter" if method == "dreambooth" else "--embedding"
    words = ["sample", "--model", str(base), kind, str(run), "--prompt", PROMPT, "--steps", "2", "--seed", "5"]
    words += ["--guidance-scale", "3", "--width", "32", "--height", "32", "--output-dir", str(tmp_path / "images")]
    assert status(words) == 0
    ours = pixels(Image.open(tmp_path / "images" / "00000.png"))

    # Stock diffusers, by the lines of the card
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    lines = code.replace(f"path/to/{base.name}", str(base)).replace("path/to/run", str(run)).splitlines()
    said: dict = {}
    exec("\n".join(line for line in lines if not line.startswith("image =")), said)
    assert np.array_equal(ours, drawn(said["pipe"]))
    assert np.abs(ours - drawn(DiffusionPipeline.from_pretrained(base))).max() > 5, "the word changes next to nothing"

    if method == "textual-inversion":
        capsys.readouterr()
        assert status(["inspect", str(run / EMBEDDING)]) == 0
        assert "text_encoder [2, 32], text_encoder_2 [2, 32]" in capsys.readouterr().out
        for to in ("comfyui", "kohya", "diffusers"):
            other = tmp_path / f"{to}.safetensors"
            assert status(["convert", str(run / EMBEDDING), str(other), "--to", to]) == 0
            assert {name: torch.equal(t, vectors[name]) for name, t in load_file(other).items()} == dict.fromkeys(
                ("clip_l", "clip_g"), True
            )


def test_a_word_that_either_tokenizer_knows_is_refused(bases, pictures, tmp_path, capsys):
    words = command("textual-inversion", bases("sdxl"), pictures, tmp_path / "run", "--placeholder-token", "circle")
    assert status([*words, "--validation-prompt", "a circle"]) == 2
    assert "circle is in the base's vocabulary" in capsys.readouterr().err


def test_a_new_word_is_refused_where_it_is_not_learnt(bases, pictures, tmp_path, capsys):
    assert status(command("textual-inversion", bases("z-image"), pictures, tmp_path / "run")) == 2
    assert "--placeholder-token" in capsys.readouterr().err
