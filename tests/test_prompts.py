"""Prompts and captions: nothing of them is cut, changed or without effect and not told."""

import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.config.verbs import EvaluateConfig
from sdtune.evaluation.inputs import plan_of
from sdtune.models import clip_skip, families, prompts
from sdtune.models.prompt_embeddings import Reading, embed, embed_weighted
from sdtune.models.prompts import Window
from sdtune.recipes.lora import Lora
from sdtune.run import stock_lines, usage
from sdtune.sampling.sample import generate
from tests.conftest import command, status
from tests.families import pipelines
from tests.tinysd import tiny_sd, tiny_tokenizer

LONG = " ".join(["a red circle"] * 26)  # 78 words of a token or more each


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_the_words_that_are_cut_are_told(tokenizer):
    window = Window(tokenizer, 77, "--long-prompts")
    assert prompts.lost_words(window, "a red circle") == ""
    assert prompts.lost_words(window, " ".join(["circle"] * 75)) == ""
    assert prompts.lost_words(window, " ".join(["circle"] * 75 + ["red", "a"])) == "red a"
    longer = Window(pipelines.t5_tokenizer(), 4, "")
    assert prompts.lost_words(longer, "a red circle") == ""
    assert prompts.lost_words(longer, "a red circle red") == "red"
    lines = []
    prompts.check_prompts("--prompt", [LONG, LONG, "a red circle"], window, lines.append)
    assert lines == [
        "--prompt: longer than the 77 tokens that this base reads; cut off: a red circle (--long-prompts reads all)"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a <lora:some name:0.8> circle", "<lora:some name:0.8> would be read as words; .* --adapter"),
        ("a (red:1.4) circle", r"\(red:1.4\) is how other programs weigh words.*--prompt-weights"),
        ("a (big red : 0.5) circle", "other programs weigh words"),
    ],
)
def test_syntax_of_other_programs_is_refused_by_name(text, said):
    with pytest.raises(UserError, match=f"--prompt: .*{said}"):
        prompts.check_prompts("--prompt", [text], None, print)


@pytest.mark.parametrize(
    ("option", "text", "other"),
    [("--class-prompt", "(red:1.4)", "-weights"), ("--validation-prompt", "<lora:x:1>", "--a")],
)
def test_no_way_out_is_named_that_leads_elsewhere(option, text, other):
    """A class prompt is a caption too, where weights are words; while training, --adapter is a kind of adapter."""
    with pytest.raises(UserError, match=r"would be read as words.* out$") as told:
        prompts.check_prompts(option, [text], None, print)
    assert other not in str(told.value)


@pytest.mark.parametrize("text", ["a circle (red)", "at 10:30", "(a: b)", "<cat> and (x:y)", "a (1:2", "(" * 1000])
def test_what_is_no_such_syntax_is_left_alone(text, tokenizer):
    prompts.check_prompts("--prompt", [text[:60]], Window(tokenizer, 77, ""), print)


def test_sample_and_previews_tell_what_they_cut_and_what_has_no_effect(sd, pictures, tmp_path, capsys):
    words = ["--model", str(sd), "--prompt", LONG, "--negative-prompt", "blue", "--guidance-scale", "1", "--steps", "1"]
    assert status(["sample", *words, "--output-dir", str(tmp_path / "drawn")]) == 0
    told = capsys.readouterr().out
    assert "--prompt: longer than the 77 tokens" in told
    assert "--negative-prompt: has no effect at a guidance scale of 1" in told
    assert status(["sample", "--model", str(sd), "--prompt", "(red:1.4)", "--output-dir", str(tmp_path / "drawn")]) == 2
    assert "other programs weigh words" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a circle --n red --l 1\n")
    words = ["--model", str(sd), "--prompt-file", str(tmp_path / "prompts.txt"), "--steps", "1"]
    assert status(["sample", *words, "--output-dir", str(tmp_path / "drawn")]) == 0
    assert "--prompt-file: --n: has no effect at a guidance scale of 1" in capsys.readouterr().out
    more = ["--caption", f"{LONG} blue", "--steps", "1", "--negative-prompt", "red", "--validation-guidance-scale", "1"]
    assert status(command(sd, pictures, tmp_path / "run", *more)) == 0
    told = capsys.readouterr().out
    assert "captions over the text encoder's 77 tokens: 11, 44 tokens lost" in told
    assert "00.png loses: a red circle blue; --long-prompts has longer captions read" in told
    assert "--negative-prompt: has no effect at a guidance scale of 1" in told
    assert status(command(sd, pictures, tmp_path / "two", "--validation-prompt", "a <lora:x:1>")) == 2
    assert "--validation-prompt: <lora:x:1> would be read" in capsys.readouterr().err


# ---- longer prompts, and another layer -----------------------------------------------------------------

TEXT = " ".join(["red circle"] * 50)
"""A hundred words of a token each."""
FIRST, SECOND = " ".join(["red circle"] * 37 + ["red"]), " ".join(["circle"] + ["red circle"] * 12)
"""The words of its two windows."""


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def ids(pipe, text):
    return pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids


def parts_of(pipe):
    return families.family_class(type(pipe).__name__).text_parts(pipe.components.get, pipe.components.get)


@torch.no_grad()
def test_a_text_is_read_in_windows_of_75(pipe):
    """As user interfaces do: each has its own marks, and their embeddings stand one behind the other."""
    short, long, longer = (row["embeds"] for row in embed(parts_of(pipe), ["a red circle", TEXT, TEXT + " red" * 60]))
    assert torch.allclose(short, pipe.text_encoder(ids(pipe, "a red circle"))[0][0], atol=1e-6)
    wanted = torch.cat([pipe.text_encoder(ids(pipe, part))[0][0] for part in (FIRST, SECOND)])
    assert torch.allclose(long, wanted, atol=1e-6)
    assert longer.shape == (3 * 77, 32)


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("negative", ["", "blue"])
@pytest.mark.parametrize("build", [tiny_sd, pipelines.sdxl])
def test_short_prompts_are_drawn_as_the_stock_call_draws_them(build, negative):
    pipe = build()
    options = {"steps": 2, "guidance_scale": 4.0, "negative_prompt": negative, "width": 32, "height": 32}
    told = ["a red circle", "a blue square"]
    stock = generate(pipe, told, [1, 2], **options)
    windows = generate(pipe, told, [1, 2], reading=Reading(long_prompts=True), **options)
    assert np.abs(pixels(stock) - pixels(windows)).max() <= 1


def test_a_long_prompt_is_drawn_whole_whatever_is_drawn_beside_it(pipe):
    options = {"steps": 2, "guidance_scale": 4.0, "reading": Reading(long_prompts=True)}
    with torch.no_grad():
        embeds = torch.cat([pipe.text_encoder(ids(pipe, part))[0] for part in (FIRST, SECOND)], 1)
        empty = torch.cat([pipe.text_encoder(ids(pipe, ""))[0]] * 2, 1)
    noise = torch.Generator("cpu").manual_seed(2)
    (stock,) = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=empty, num_inference_steps=2, guidance_scale=4.0, generator=noise
    ).images
    drawn = generate(pipe, ["a red circle", TEXT], [1, 2], **options)
    assert np.abs(pixels([stock]) - pixels(drawn[1:])).max() <= 1
    alone = generate(pipe, ["a red circle"], [1], **options)
    assert np.array_equal(pixels(alone), pixels(drawn[:1]))


@torch.no_grad()
def test_a_caption_is_the_same_whatever_it_is_trained_beside(sd, tmp_path):
    cfg = LoraConfig(model=str(sd), dataset="d", long_prompts=True)
    family = families.load(cfg, torch.device("cpu"), torch.float32)
    together, alone = family.encode(["a red circle", TEXT]), family.encode(["a red circle"])
    assert together["mask"].sum(1).tolist() == [77, 154]
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 3])
    assert torch.allclose(family.predict(x, t, together)[:1], family.predict(x[:1], t[:1], alone), atol=1e-5)


def test_training_with_another_layer_and_long_captions_is_another_run(lora, sd, tmp_path):
    """Each has keys of its own in the cache, which the runs share: a second run of each gives the same bytes."""

    def adapter(name, *more):
        run = lora(name, "--caption", f"{LONG} blue", "--steps", "2", *more)
        return (run / "pytorch_lora_weights.safetensors").read_bytes()

    ways = {"cut": [], "windows": ["--long-prompts"], "layer": ["--clip-skip", "2"]}
    made = {name: adapter(name, *more) for name, more in ways.items()}
    assert len(set(made.values())) == 3
    assert adapter("again", *ways["windows"]) == made["windows"]
    assert adapter("also", *ways["layer"]) == made["layer"]


def test_an_adapter_is_sampled_at_the_layer_that_it_was_trained_at(lora, sd, tmp_path):
    more = ["--clip-skip", "2", "--steps", "3", "--learning-rate", "0.1", "--train-text-encoder"]
    run = lora("run", *more)
    out = tmp_path / "drawn"
    words = ["sample", "--adapter", str(run), "--prompt", "a red circle", "--steps", "2", "--output-dir", str(out)]
    assert status(words) == 0
    drawn = Image.open(out / "00000.png")
    assert "Clip skip: 2" in drawn.info["parameters"]
    about = LoraConfig(dataset="d", clip_skip=2, long_prompts=True).describe()
    kind = usage.artefact_kind({"pytorch_lora_weights.safetensors": run})
    code = stock_lines.lines(
        kind, str(run), None, str(sd), None, "a red circle", None, about.clip_skip, about.long_prompts
    )
    assert "sdtune sample --long-prompts" in code
    code = code.partition("image = ")[0].replace("DiffusionPipeline", "StableDiffusionPipeline")
    known = {}
    exec(code, known)
    noise = torch.Generator("cpu").manual_seed(0)
    stock = known["pipe"]("a red circle", num_inference_steps=2, guidance_scale=5.0, generator=noise)
    assert np.abs(pixels([drawn]) - pixels(stock.images)).max() <= 1
    whole = lora("whole", "--steps", "1", "--train-text-encoder")  # of all layers, of which one is left out
    words = ["sample", "--adapter", str(whole), "--clip-skip", "2", "--prompt", "a red circle", "--steps", "1"]
    assert status([*words, "--output-dir", str(out)]) == 0
    plain = StableDiffusionPipeline.from_pretrained(sd)
    clip_skip.skip_layers(plain.text_encoder, 2, "x")
    plain.save_pretrained(tmp_path / "cut")
    assert len(StableDiffusionPipeline.from_pretrained(tmp_path / "cut").text_encoder.encoder.layers) == 1


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (tiny_sd, {"clip_skip": 3}, "--clip-skip 3: the text encoder of .* has 2 layers"),
        (pipelines.sdxl, {"clip_skip": 1}, "--clip-skip 1: a StableDiffusionXLPipeline always reads .* layer 2"),
        (pipelines.z_image, {"clip_skip": 2}, "--clip-skip 2: a ZImagePipeline has no such choice"),
        (pipelines.flux, {"long_prompts": True}, "--long-prompts: a FluxPipeline reads prompts in its own way"),
        (pipelines.sd3, {"prompt_weights": True}, "--prompt-weights: a StableDiffusion3Pipeline reads"),
    ],
)
def test_what_a_base_cannot_do_is_refused_in_training_and_sampling(build, options, said, tmp_path, capsys):
    folder = pipelines.save(build, tmp_path / "base")
    with pytest.raises(UserError, match=said):
        families.load(LoraConfig(model=str(folder), dataset="d", **options), torch.device("cpu"), torch.float32).encode(
            ["x"]
        )
    more = [f"--{name.replace('_', '-')}{f'={value}' if value is not True else ''}" for name, value in options.items()]
    words = ["sample", "--model", str(folder), "--prompt", "x", "--output-dir", str(tmp_path / "drawn"), *more]
    assert status(words) == 2
    assert said.partition(":")[0] in capsys.readouterr().err


def test_evaluation_samples_as_it_is_told(sd, pictures, tmp_path):
    asked = {"clip_skip": 2, "long_prompts": True, "prompt_weights": True}
    cfg = EvaluateConfig(samples=str(sd), reference=str(pictures), num_images=2, output_dir=tmp_path, **asked)
    chosen = plan_of(cfg).sampling
    assert chosen.model == str(sd)
    assert {name: getattr(chosen, name) for name in asked} == asked
    with pytest.raises(UserError, match="--clip-skip: for images that are drawn, and SAMPLES is a folder"):
        plan_of(cfg.model_copy(update={"samples": str(pictures)}))


# ---- weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "compel", "plain"),
    [
        ("a (red:1.4) circle", "a (red)1.4 circle", "a red circle"),
        ("((red:1.2) circle:0.5) a", "((red)1.2 circle)0.5 a", "red circle a"),
        ("(((big) red:1.2) circle:0.5)", "(((big) red)1.2 circle)0.5", "(big) red circle"),
        ("a (red) circle, 10:30", "a (red) circle, 10:30", "a (red) circle, 10:30"),
    ],
)
def test_weights_are_written_as_compel_reads_them(text, compel, plain):
    assert prompts.compel_syntax(text) == compel
    assert prompts.without_weights(text) == plain


@pytest.mark.parametrize("build", [tiny_sd, pipelines.sdxl])
@torch.no_grad()
def test_weights_of_words_have_an_effect(build):
    pytest.importorskip("compel")
    pipe = build()
    parts = parts_of(pipe)
    (plain,) = embed(parts, ["a red circle"])
    same, more, long = embed_weighted(parts, pipe, ["a (red:1.0) circle", "a (red:2) circle", f"(red:2) {TEXT}"], True)
    assert [len(row["embeds"]) for row in (same, more, long)] == [154] * 3
    assert torch.allclose(same["embeds"][:77], plain["embeds"], atol=1e-5)
    assert (more["embeds"][:77] - plain["embeds"]).abs().max() > 0.1
    if "pooled" in plain:
        assert torch.allclose(more["pooled"], plain["pooled"], atol=1e-5)
    (cut,) = embed_weighted(parts, pipe, [f"(red:2) {TEXT}"], False)
    assert len(cut["embeds"]) == 77
    options = {"steps": 1, "guidance_scale": 4.0, "width": 32, "height": 32, "negative_prompt": "(blue:1.5)"}
    (image,) = generate(pipe, ["a (red:1.5) circle"], [1], reading=Reading(prompt_weights=True), **options)
    assert image.size == (32, 32)


def test_previews_weigh_words_too(sd, pictures):
    pytest.importorskip("compel")
    families.silence_libraries()
    options = {"prompt_weights": True, "validation_inference_steps": 2, "resolution": 32}
    recipe = Lora(LoraConfig(model=str(sd), dataset=str(pictures), **options), torch.device("cpu"))
    plain, heavy = (recipe.sample([f"a (red:{weight}) circle"], [1]) for weight in ("1.0", "1.9"))
    assert np.abs(pixels(plain) - pixels(heavy)).max() > 1


def test_without_compel_the_way_to_it_is_told(sd, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "compel", None)
    words = ["--model", str(sd), "--prompt", "(red:1.4)", "--prompt-weights", "--output-dir", str(tmp_path)]
    assert status(["sample", *words]) == 2
    assert "pip install 'sdtune[prompts]'" in capsys.readouterr().err
