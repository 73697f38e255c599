"""``sdtune textual-inversion``: a word that stock diffusers reads, and a base that has not moved."""

import hashlib
import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from sdtune.config.sections import UserError
from sdtune.data import Images, Row, with_captions
from sdtune.models import new_token
from sdtune.run import checkpoints
from tests import contract
from tests.conftest import status
from tests.tinysd import tiny_sd

FILE = "learned_embeds.safetensors"
PROMPT = "a red <thing>"


def token_ids(pipe, caption):
    """``[77]``; a word of several vectors is spelt as diffusers spells it in a prompt."""
    text = pipe.maybe_convert_prompt(caption, pipe.tokenizer)
    return pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids[0]


def stock(sd, embedding=None):
    pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    if embedding is not None:
        pipeline.load_textual_inversion(embedding)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    return np.asarray(pipeline(PROMPT, num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0])


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("**/*.safetensors"))}


@pytest.mark.parametrize("vectors", [1, 3])
def test_stock_diffusers_gives_the_picture_of_sdtune_sample(vectors, trained, sd, tmp_path):
    before = digest(sd)
    options = ["--num-vectors", str(vectors), "--learning-rate", "1e-1", "--steps", "3"]
    run = trained("textual-inversion", "run", *options)
    assert digest(sd) == before
    assert {k: tuple(t.shape) for k, t in load_file(run / FILE).items()} == {"<thing>": (vectors, 32)}
    sample = ["sample", "--embedding", str(run), "--prompt", PROMPT, "--steps", "4", "--seed", "5"]
    assert status([*sample, "--output-dir", str(tmp_path / "images")]) == 0
    ours = np.asarray(Image.open(tmp_path / "images" / "00000.png"))
    assert np.array_equal(ours, stock(sd, run / FILE))
    assert not np.array_equal(ours, stock(sd)), "the word changes nothing"


def test_only_the_new_rows_are_trained_and_they_move(trained, sd):
    run = trained("textual-inversion", "run", "--initializer-token", "red", "--steps", "2")
    groups, _ = checkpoints.load(checkpoints.found(run / "checkpoints")[-1])
    (rows,) = groups["weights"].values()
    assert rows.shape == (2, 32)
    assert {t.numel() for t in groups["optimizer"].values()} <= {1, rows.numel()}
    tokenizer, table = tiny_sd().tokenizer, CLIPTextModel.from_pretrained(sd / "text_encoder").get_input_embeddings()
    red = table.weight[tokenizer("red", add_special_tokens=False).input_ids[0]]
    assert all(not torch.allclose(row, red, atol=1e-4) for row in rows)


def test_copies_on_the_way_and_the_norm_are_there(trained):
    run = trained("textual-inversion", "run", "--export-steps", "2", "--log-steps", "2", "--steps", "6")
    copies = [load_file(run / "exports" / f"step-{k:06d}" / FILE)["<thing>"] for k in (2, 4, 6)]
    assert not torch.equal(copies[0], copies[1])
    assert torch.equal(copies[2], load_file(run / FILE)["<thing>"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    norms = [line["embedding_norm"] for line in lines if "embedding_norm" in line]
    assert len(norms) == 3 and min(norms) > 0 and len(set(norms)) == 3


def test_norm_weight_holds_the_norm(trained):
    options = ["--learning-rate", "1e-1", "--steps", "16", "--initializer-token", "red"]
    free = load_file(trained("textual-inversion", "free", *options) / FILE)["<thing>"].norm(dim=1)
    held = load_file(trained("textual-inversion", "held", *options, "--norm-weight", "10") / FILE)["<thing>"].norm(
        dim=1
    )
    usual = torch.stack([row.norm() for row in tiny_sd().text_encoder.get_input_embeddings().weight]).mean()
    assert (held - usual).abs().max() < (free - usual).abs().max()


def test_a_word_of_several_vectors_is_spelt_as_diffusers_spells_it():
    pipe = tiny_sd()
    new_token.add_token(pipe.tokenizer, pipe.text_encoder, "<thing>", torch.zeros(3, 32))
    ids = token_ids(pipe, "a red <thing> circle").tolist()
    first = len(pipe.tokenizer) - 3
    assert [i for i in ids if i >= first] == [first, first + 1, first + 2]
    prompt = pipe.maybe_convert_prompt("a red <thing> circle", pipe.tokenizer)
    given = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    assert ids == given


@pytest.mark.parametrize("caption", ["a <thing>, red", "a photo of <thing>.", "a <THING> of mine", "my<thing>"])
def test_a_caption_says_the_word_where_the_tokenizer_finds_it(caption):
    pipe = tiny_sd()
    new_token.add_token(pipe.tokenizer, pipe.text_encoder, "<Thing>", torch.zeros(1, 32))
    assert len(pipe.tokenizer) - 1 in token_ids(pipe, caption).tolist()
    images = Images([Row("a.png", (caption,), 32, 32, "")], [], [], [])
    assert new_token.require_word("<Thing>", images) is images
    with pytest.raises(UserError, match="1 of 1 captions do not say it"):
        new_token.require_word("<Thing>", with_captions(images, ["a thing"]))


def test_frozen_rows_get_no_gradient_and_new_ones_do():
    pipe = tiny_sd()
    pipe.text_encoder.requires_grad_(False)
    start = new_token.starting_rows(pipe.tokenizer, pipe.text_encoder, ["red", "circle"], 2, mean=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(start[0], table[pipe.tokenizer("red", add_special_tokens=False).input_ids[0]])
    embedding = new_token.add_token(pipe.tokenizer, pipe.text_encoder, "<thing>", start)
    pipe.text_encoder(token_ids(pipe, "a <thing>")[None])[0].sum().backward()
    assert embedding.rows.grad.norm() > 0
    assert [n for n, p in pipe.text_encoder.named_parameters() if p.grad is not None] == [
        n for n, p in pipe.text_encoder.named_parameters() if p is embedding.rows
    ]


def test_start_at_the_mean():
    pipe = tiny_sd()
    table = pipe.text_encoder.get_input_embeddings().weight
    whole = new_token.starting_rows(pipe.tokenizer, pipe.text_encoder, [], 2, mean=False)
    assert torch.allclose(whole, table.mean(0).expand(2, -1))
    several = new_token.starting_rows(pipe.tokenizer, pipe.text_encoder, ["red", "zebra"], 1, mean=True)
    ids = pipe.tokenizer("red zebra", add_special_tokens=False).input_ids
    assert len(ids) > 2 and torch.allclose(several[0], table[ids].mean(0))


def test_templates_of_ones_own_and_captions(trained, tmp_path, places, capsys):
    file = tmp_path / "templates.txt"
    file.write_text("a drawing of {}\n\n{} in red\n")
    run = trained(
        "textual-inversion", "own", "--template-file", str(file), "--num-validation-images", "2", "--steps", "1"
    )
    assert "a drawing of &lt;thing&gt;" in (run / "report.html").read_text()
    assert (run / FILE).exists()
    trained("textual-inversion", "captions", "--caption", "a <thing> of mine", "--steps", "1")
    file.write_text("a drawing\n")
    assert refusal(places, tmp_path, capsys, "--template-file", str(file)).count("no {} in the line 'a drawing'") == 1


def refusal(places, tmp_path, capsys, *options):
    capsys.readouterr()
    assert status(contract.command("textual-inversion", places, tmp_path / "refused", *options)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--placeholder-token", "circle"], "circle is in the base's vocabulary"),
        (["--placeholder-token", "Circle"], "Circle is in the base's vocabulary"),
        (["--placeholder-token", "two words"], "wants one word"),
        (["--placeholder-token", ""], "wants one word"),
        (["--validation-prompt", "a red circle", "a blue one"], "validation_prompt: none says <thing>"),
        (["--initializer-token", "zebra"], "zebra: is 5 tokens of this base"),
        (["--initializer-token", "red", "green", "blue"], "3 words for 2 vectors"),
        (["--caption", "a photo"], "11 of 11 captions do not say it"),
        (["--caption-column", "text"], "11 of 11 captions do not say it"),
        (["--template-file", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_mistakes_are_told(options, told, places, tmp_path, capsys):
    assert told in refusal(places, tmp_path, capsys, *options)


def test_embedding_that_does_not_fit(shared, sd, tmp_path, capsys):
    run = shared("textual-inversion", "--steps", "2")
    sample = ["sample", "--model", str(sd), "--prompt", "x", "--output-dir", str(tmp_path / "images")]
    assert status([*sample, "--embedding", str(run), str(run / FILE)]) == 2
    assert "<thing>" in capsys.readouterr().err
    assert status(["sample", "--model", "tiny", "--prompt", "x", "--embedding", str(run)]) == 2
    assert f"--embedding {run}: its vectors are 32 wide" in capsys.readouterr().err
    assert status([*sample, "--adapter", str(run)]) == 2
    assert f"give --embedding {run}" in capsys.readouterr().err
    assert status([*sample, "--embedding", str(sd)]) == 2
