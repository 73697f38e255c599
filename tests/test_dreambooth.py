"""``sdtune dreambooth``: class pictures, prior preservation image by image, artefacts that stock diffusers loads."""

import hashlib
import json
import shutil
import signal

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from sdtune.config.methods.dreambooth import DreamBoothConfig
from sdtune.config.sections import UserError
from sdtune.data import Mixture, Stream, load_images
from sdtune.recipes.dreambooth import DreamBooth
from sdtune.run import checkpoints
from tests import contract, ranks
from tests.conftest import status

LORA, EMBEDDING = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
PROMPT = "a red circle"
MADE = ["--class-prompt", "a red circle", "--num-class-images", "6", "--class-inference-steps", "2"]
WORD = "<thing>"
WORDED = ["--lora", "--placeholder-token", WORD, "--caption", f"a {WORD} circle"]


def words(places, out, *options):
    """A short run without class pictures, unless the options ask for them."""
    small = [
        "--model",
        str(places.sd),
        "--dataset",
        str(places.pictures),
        "--output-dir",
        str(out),
        "--resolution",
        "32",
    ]
    small += ["--steps", "2", "--train-batch-size", "2", "--learning-rate", "1e-3", "--dataloader-num-workers", "0"]
    previews = ["--num-validation-images", "0", "--validation-inference-steps", "1"]
    return ["dreambooth", *small, *previews, *options]


@pytest.fixture
def subject(places, tmp_path):
    def run(name, *options):
        assert status(words(places, tmp_path / name, *options)) == 0
        return tmp_path / name

    return run


def drawn(pipeline, prompt=PROMPT):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    return np.asarray(pipeline(prompt, num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0])


def ours(out, *options, prompt=PROMPT):
    sample = ["sample", *options, "--prompt", prompt, "--steps", "4", "--seed", "5", "--guidance-scale", "5"]
    assert status([*sample, "--output-dir", str(out)]) == 0
    return np.asarray(Image.open(out / "00000.png"))


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("made-*"))}


# ---- class pictures ----------------------------------------------------------------------------------


def test_base_makes_the_class_pictures_that_are_lacking(subject, places, tmp_path, capfd):
    run = subject("run", "--prior-preservation", *MADE)
    folder = run / "class-pictures"
    assert sorted(p.name for p in folder.iterdir()) == [f"made-{k:05d}.png" for k in range(6)]
    assert {Image.open(p).size for p in folder.iterdir()} == {(32, 32)}
    assert "6 of them of the class" in capfd.readouterr().out
    other = subject("other", "--prior-preservation", *MADE, "--seed", "1")
    assert set(digests(folder).values()).isdisjoint(digests(other / "class-pictures").values())
    own = tmp_path / "own"
    own.mkdir()
    for k in range(4):
        Image.open(folder / f"made-{k:05d}.png").save(own / f"photo-{k}.png")
    subject("topped", "--prior-preservation", *MADE, "--class-data", str(own))
    assert digests(own) == {name: made for name, made in digests(folder).items() if name < "made-00002"}
    assert json.loads(Image.open(own / "made-00000.png").info["sdtune"])["class_prompt"] == ["a red circle"]


def test_a_made_picture_does_not_depend_on_how_many_are_asked_for(subject):
    options = ["--prior-preservation", *MADE, "--sample-batch-size", "4", "--num-class-images"]
    five, seven = (digests(subject(n, *options, n) / "class-pictures") for n in ("5", "7"))
    assert len(five) == 5 and five == {name: made for name, made in seven.items() if name in five}


def test_own_class_pictures_keep_their_captions_and_as_many_are_used_as_asked_for(subject, places, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for k in range(4):
        shutil.copy(places.pictures / f"{k:02d}.png", own / f"{k}.png")
    (own / "1.txt").write_text("a blue square")
    prior = ["--prior-preservation", "--class-data", str(own), "--class-inference-steps", "2", "--num-class-images"]
    subject("fewer", *prior, "3", "--class-prompt", "a red circle")
    assert "3 of them of the class" in capsys.readouterr().out and len(list(own.glob("*.png"))) == 4
    subject("more", *prior, "6", "--class-prompt", "a red circle")
    assert "6 of them of the class" in capsys.readouterr().out and len(digests(own)) == 2
    cfg = config(places, dataset=str(own))
    assert [row.captions[0] for row in load_images(cfg, default_caption="a red circle").rows] == [
        *("a red circle", "a blue square"),
        *["a red circle"] * 4,
    ]
    prompts = ["--class-prompt", "a red circle", "a blue square"]
    assert status(words(places, tmp_path / "two", *prior, "9", *prompts)) == 2
    assert "not said which of the class prompts they show" in capsys.readouterr().err
    (own / "1.txt").unlink()
    assert status(words(places, tmp_path / "none", *prior, "4")) == 2
    assert "the pictures have no captions; add --class-prompt" in capsys.readouterr().err


def test_several_class_prompts_take_turns_and_caption_their_pictures(subject):
    options = ["--class-prompt", "a red circle", "a blue square", *MADE[2:]]
    folder = subject("run", "--prior-preservation", *options) / "class-pictures"
    told = [folder.joinpath(f"made-{k:05d}.txt").read_text().strip() for k in range(6)]
    assert told == ["a red circle", "a blue square"] * 3


@pytest.mark.fault(
    "A run is killed while it makes class images", "The same command makes those that are missing, to the same bytes."
)
@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_making_goes_on_to_the_same_bytes(processes, subject, places, tmp_path):
    options = ["--prior-preservation", *MADE, "--num-class-images", "21", "--sample-batch-size", "2"]
    whole = digests(subject("whole", *options) / "class-pictures")
    cut = tmp_path / "cut"
    third = cut / "class-pictures" / "made-00004.png"
    code, _ = ranks.interrupt(words(places, cut, *options), tmp_path / "output", signal.SIGKILL, third.exists)
    assert code == -signal.SIGKILL
    made = digests(cut / "class-pictures")
    assert 5 <= len(made) < 21
    kept = (cut / "class-pictures" / "made-00000.png").stat().st_mtime_ns
    again = words(places, cut, *options, "--train-batch-size", str(2 // processes))
    ranks.train(processes, again, tmp_path / "output")
    assert digests(cut / "class-pictures") == whole
    assert (cut / "class-pictures" / "made-00000.png").stat().st_mtime_ns == kept, "it was made anew"


@pytest.mark.processes
def test_ctrl_c_does_not_wait_for_the_last_class_picture(places, tmp_path):
    """And what stopped before its first step is in no other run's way."""
    options, out = ["--prior-preservation", *MADE, "--sample-batch-size", "1"], tmp_path / "run"
    first = out / "class-pictures" / "made-00000.png"
    many = [*options, "--num-class-images", "400"]
    code, _ = ranks.interrupt(words(places, out, *many), tmp_path / "output", signal.SIGINT, first.exists)
    assert code == 128 + signal.SIGINT
    assert 1 <= len(digests(out / "class-pictures")) < 400
    assert status(words(places, out, *options, "--num-class-images", "2", "--learning-rate", "1e-3")) == 0
    assert len(digests(out / "class-pictures")) == 2


@pytest.mark.processes
def test_two_processes_make_the_same_pictures(subject, places, tmp_path):
    options = ["--prior-preservation", *MADE, "--num-class-images", "9", "--sample-batch-size", "2"]
    whole = subject("whole", *options, "--train-batch-size", "2")
    two = words(places, tmp_path / "two", *options, "--train-batch-size", "1")
    ranks.train(2, two, tmp_path / "output")
    assert digests(whole / "class-pictures") == digests(tmp_path / "two" / "class-pictures")


# ---- prior preservation ------------------------------------------------------------------------------


@pytest.fixture
def both(places):
    return Mixture(*(load_images(config(places)) for _ in range(2)))


def config(places, **fields):
    common = {"model": str(places.sd), "dataset": str(places.pictures), "resolution": 32, "num_holdout_images": 3}
    return DreamBoothConfig(**common | fields)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_subject_and_class_take_turns_whatever_the_cut(group, both, places):
    stream = Stream(config(places), both, group)
    seen = [stream[p] for p in range(64)]
    assert [s.part for s in seen] == [0, 1] * 32
    other = Stream(config(places), both, 4)
    assert [s.index for s in seen] == [other[p].index for p in range(64)]
    held = {s.index for s in stream.holdout}
    assert len(held) == 3 and max(held) < 11
    assert {s.index for s in seen if s.part == 0} == set(range(11)) - held
    assert {s.index for s in seen if s.part == 1} == set(range(11, 22))
    assert [s.index for s in seen[::2]] != [s.index - 11 for s in seen[1::2]], "both in the same order"


WEIGHTS = {
    "none": {},
    "min-SNR": {"snr_gamma": 5.0},
    "huber": {"loss_type": "huber"},
    "velocity, min-SNR, huber": {"prediction_type": "v_prediction", "snr_gamma": 1.0, "loss_type": "huber"},
    "noise": {"noise_offset": 0.1, "input_perturbation": 0.1, "timestep_bias_strategy": "later", "snr_gamma": 5.0},
}


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_is_weighted_image_by_image(size, weights, places, tmp_path):
    """The mistake it guards against: a batch of one, whose weight [1] broadcasts over both halves."""
    fields = {"prior_preservation": True, "class_data": places.pictures, "num_class_images": 11, "cache": False}
    cfg = config(places, prior_loss_weight=0.25, output_dir=tmp_path, **WEIGHTS[weights], **fields)
    recipe = DreamBooth(cfg, torch.device("cpu"))
    dataset = recipe.dataset(2, lambda line: None)
    batch = torch.utils.data.default_collate([dataset[p] for p in range(3, 3 + size)])
    assert batch.pop("part").tolist() == [(3 + k) % 2 for k in range(size)]
    with torch.no_grad():
        alone = [
            recipe({k: v[i : i + 1] for k, v in batch.items() if k != "name"} | {"part": torch.zeros(1)})
            for i in range(size)
        ]
        weighted = recipe(batch | {"part": torch.tensor([(3 + k) % 2 for k in range(size)])})
    want = [loss * (0.25 if (3 + k) % 2 else 1) for k, loss in enumerate(alone)]
    assert weighted.shape == (size,)
    assert torch.allclose(weighted, torch.cat(want), rtol=1e-4)


def test_an_odd_batch_ends_as_its_images_one_by_one(subject, places):
    """A step of three shows two of the one part and one of the other, then the other way round."""
    prior = ["--prior-preservation", "--class-data", str(places.pictures), "--num-class-images", "11"]
    prior += ["--snr-gamma", "5", "--loss-type", "huber", "--prior-loss-weight", "0.5", "--learning-rate", "1e-5"]
    whole = subject("whole", *prior, "--steps", "4", "--train-batch-size", "3")
    cut = subject("cut", *prior, "--steps", "4", "--train-batch-size", "1", "--gradient-accumulation-steps", "3")
    one, other = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in (whole, cut))
    assert max((one[k] - other[k]).abs().max() for k in one) < 1e-6


# ---- artefacts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["--train-text-encoder", "--prior-preservation", *MADE], ["--use-ema"]])
def test_pipeline_in_stock_diffusers_gives_the_picture_of_sdtune_sample(more, subject, sd, tmp_path):
    run = subject("run", *more)
    stock = drawn(DiffusionPipeline.from_pretrained(run))
    assert np.array_equal(ours(tmp_path / "images", "--model", str(run)), stock)
    assert not np.array_equal(stock, drawn(StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)))
    files = [folder / "text_encoder" / "model.safetensors" for folder in (sd, run)]
    same = [torch.equal(t, load_file(files[1])[k]) for k, t in load_file(files[0]).items() if t.is_floating_point()]
    assert any(same) is ("--train-text-encoder" not in more) or not all(same)


def test_adapters_and_word_in_stock_diffusers_give_the_picture_of_sdtune_sample(subject, sd, tmp_path):
    run = subject("run", "--lora", "--train-text-encoder", "--placeholder-token", WORD, "--caption", f"a {WORD} circle")
    stock = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    stock.load_lora_weights(run, weight_name=LORA)
    stock.load_textual_inversion(run / EMBEDDING)
    prompt = f"a {WORD} circle"
    assert np.array_equal(ours(tmp_path / "images", "--adapter", str(run), prompt=prompt), drawn(stock, prompt))


def test_a_mixture_of_adapters_and_words(subject, trained, sd, tmp_path):
    one = subject("one", "--lora", "--learning-rate", "1e-2")
    two = subject("two", "--lora", "--learning-rate", "1e-2", "--rank", "2", "--train-text-encoder", "--seed", "1")
    word = trained("textual-inversion", "word", "--learning-rate", "1e-1")
    full = subject("full")
    prompt = f"a {WORD} circle"
    adapters = [f"{one}=0.5", f"{two}=-0.75"]
    options = ["--adapter", *adapters, "--embedding", str(word), "--unet", str(full)]
    stock = StableDiffusionPipeline.from_pretrained(
        sd, unet=DiffusionPipeline.from_pretrained(full).unet, safety_checker=None
    )
    stock.load_lora_weights(one, weight_name=LORA, adapter_name="one")
    stock.load_lora_weights(two, weight_name=LORA, adapter_name="two")
    stock.set_adapters(["one", "two"], [0.5, -0.75])
    stock.load_textual_inversion(word / EMBEDDING)
    image = ours(tmp_path / "images", *options, prompt=prompt)
    assert np.array_equal(image, drawn(stock, prompt))
    told = Image.open(tmp_path / "images" / "00000.png").text["parameters"]
    assert all(part in told for part in (*adapters, f"Embeddings: {word}", f"UNet: {full}", f"Model: {sd}"))
    alone = ours(tmp_path / "alone", "--unet", str(full))  # on the base that it was trained from
    assert np.array_equal(alone, drawn(DiffusionPipeline.from_pretrained(full)))
    assert not np.array_equal(image, alone)


def test_half_precision(subject):
    run = subject("run", "--mixed-precision", "bf16", "--train-text-encoder", "--num-validation-images", "2")
    for file in sorted(run.glob("*/*.safetensors")):
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float32}, file


# ---- pivotal tuning ----------------------------------------------------------------------------------


WORD_HELD = ["--placeholder-frac", "0"]
SHARES = [*WORDED, "--train-text-encoder", "--placeholder-frac", "0.5", "--unet-frac", "0.75"]
SHARES += ["--checkpointing-steps", "2", "--checkpoints-total-limit", "9", "--steps", "8"]


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "adamw_schedulefree"])
def test_each_part_moves_for_its_share_of_the_run(optimizer, subject):
    """To the bit, also with optimizers that remember the rate they once had."""
    options = {
        "prodigy": ["--learning-rate", "1", "--optimizer-args", "{d0: 0.001}"],
        "adamw_schedulefree": ["--lr-scheduler", "constant"],
    }
    run = subject("run", *SHARES, "--optimizer", optimizer, *options.get(optimizer, []))
    steps = {c.name: checkpoints.load(c)[0]["weights"] for c in checkpoints.found(run / "checkpoints")}
    two, four, six, eight = (steps[f"step-{k:06d}"] for k in (2, 4, 6, 8))
    rows = [name for name in two if name.endswith(".rows")]
    unet = [name for name in two if name.startswith("unet") and "lora_B" in name]
    text = [name for name in two if name.startswith("text_encoder") and "lora_B" in name]
    assert len(rows) == 1 and unet and text

    def still(names, one, other):
        return [torch.equal(one[name], other[name]) for name in names]

    assert not any(still(rows, two, four)) and all(still(rows, four, six)) and all(still(rows, six, eight))
    assert not any(still(unet, four, six)) and all(still(unet, six, eight))
    assert not any(still(text, six, eight))


def test_a_run_goes_on_across_the_end_of_a_share_to_the_same_bits(subject, tmp_path):
    whole = subject("whole", *SHARES)
    for last in (2, 4, 6):
        cut = shutil.copytree(whole, tmp_path / f"after-{last}")
        for checkpoint in checkpoints.found(cut / "checkpoints"):
            if int(checkpoint.name[-6:]) > last:
                shutil.rmtree(checkpoint)
        for name in ("report.html", LORA, EMBEDDING):
            (cut / name).unlink()
        assert subject(cut.name, *SHARES) == cut
        (one, _), (other, _) = (checkpoints.load(checkpoints.found(run / "checkpoints")[-1]) for run in (whole, cut))
        assert one.keys() == other.keys()
        for group in one:
            assert one[group].keys() == other[group].keys()
            assert [k for k in one[group] if not torch.equal(one[group][k], other[group][k])] == [], last
        assert (whole / LORA).read_bytes() == (cut / LORA).read_bytes(), last
        assert (whole / EMBEDDING).read_bytes() == (cut / EMBEDDING).read_bytes(), last


def test_a_part_that_does_not_move_has_no_say_in_the_clipping(subject):
    """The squared norm of the first step is that of the word and that of the adapters, each by itself."""

    def squared(name, *options):
        run = subject(name, *WORDED, "--log-steps", "1", "--steps", "1", *options)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return next(line["grad_norm"] for line in lines if "grad_norm" in line) ** 2

    both, word, adapters = squared("both"), squared("word", "--unet-frac", "0"), squared("adapters", *WORD_HELD)
    assert word > 0 and adapters > 0
    assert both == pytest.approx(word + adapters, rel=1e-5)


# ---- mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--class-prompt", "a dog"],
            "class_prompt has no effect without prior_preservation: add --prior-preservation",
        ),
        (["--prior-preservation"], "prior_preservation needs class_prompt"),
        (
            ["--prior-preservation", "--class-data", "{pictures}", "--num-class-images", "99"],
            "11 of --num-class-images 99",
        ),
        (["--prior-preservation", "--class-data", "/proc/nowhere", *MADE], "cannot be written"),
        (["--prior-preservation", *MADE, "--buckets"], "prior_preservation with buckets"),
        (["--rank", "4"], "rank has no effect without lora: add --lora"),  # its default: who gives it expects adapters
        (["--rank", "8"], "rank has no effect without lora: add --lora"),
        (["--placeholder-token", WORD], "add --lora"),
        ([*WORDED, "--instance-prompt", "a dog"], f"instance_prompt does not say {WORD}"),
        ([*WORDED, "--validation-prompt", "a dog"], f"validation_prompt: none says {WORD}"),
        ([*WORDED, "--prior-preservation", "--class-prompt", f"a {WORD}"], f"class_prompt says {WORD}"),
        ([*WORDED, "--initializer-token", "zebra"], "zebra: is 5 tokens of this base"),
        (WORDED[:3], f"--placeholder-token {WORD}: 11 of 11 captions do not say it"),
        (["--lora", "--placeholder-token", "red", "--caption", "a red thing"], "red is in the base's vocabulary"),
        (["--initializer-token", "red"], "initializer_token has no effect without placeholder_token"),
        (["--num-vectors", "2"], "num_vectors has no effect without placeholder_token"),
        (["--placeholder-frac", "0.5"], "placeholder_frac has no effect without placeholder_token"),
        (["--text-encoder-frac", "0.5"], "text_encoder_frac has no effect without train_text_encoder"),
        (["--text-encoder-lr", "1e-4"], "text_encoder_lr has no effect without train_text_encoder"),
        (["--unet-frac", "0.5"], "unet_frac: nothing would train to the end"),
        ([*WORDED, "--unet-frac", "0.5", "--placeholder-frac", "0.5"], "unet_frac and placeholder_frac: nothing would"),
        (["--instance-data", "/nowhere"], "no such folder"),
    ],
)
def test_mistakes_are_told(options, told, places, tmp_path, capsys):
    options = [option.format(pictures=places.pictures) for option in options]
    assert status(words(places, tmp_path / "run", *options)) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (["--placeholder-token", "Circle", "--caption", "a circle"], "Circle is in the base's vocabulary"),
        ([*WORDED[1:], "--initializer-token", "zebra"], "zebra: is 5 tokens"),
    ],
)
def test_what_is_wrong_with_the_word_is_told_before_the_base_draws(word, told, places, tmp_path, capsys):
    options = ["--prior-preservation", "--class-prompt", "a square", *MADE[2:], "--lora", *word]
    assert status(words(places, tmp_path / "run", *options)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "class-pictures").exists()


def test_pictures_made_with_other_settings_are_not_mixed(subject, places, tmp_path, capsys):
    folder = ["--prior-preservation", "--class-data", str(tmp_path / "class"), *MADE]
    subject("one", *folder)
    assert status(words(places, tmp_path / "two", *folder, "--seed", "7")) == 2
    assert "was made with other settings" in capsys.readouterr().err
    run = ["--prior-preservation", *MADE, "--overwrite"]
    before = digests(subject("run", *run) / "class-pictures")
    after = digests(subject("run", *run, "--seed", "7") / "class-pictures")
    assert before.keys() == after.keys() and before != after


def test_instance_prompt_is_for_images_without_captions(subject, places, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.open(places.pictures / "00.png").save(bare / "a.png")
    (bare / "notes.pdf").write_bytes(b"stray")
    out = subject(
        "run", "--dataset", str(bare), "--instance-prompt", "a photo of sks dog", "--num-validation-images", "1"
    )
    assert "other files, ignored: 1 (notes.pdf)" in capsys.readouterr().out
    assert "a photo of sks dog" in (out / "report.html").read_text()
    captioned = subject("own", "--instance-prompt", "a photo of sks dog", "--num-validation-images", "1")
    assert "a red circle 0" in (captioned / "report.html").read_text()
    assert status(words(places, tmp_path / "none", "--dataset", str(bare))) == 2
    assert "no captions" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["texts", "table", "saved"])
def test_instance_prompt_is_for_each_picture_that_has_no_caption(kind, places, tmp_path, capsys):
    """Of four pictures the first has a caption of its own, the second a blank one, the others none."""
    own, blank, prompt = "a red circle", " ", "a photo of sks dog"
    folder = tmp_path / kind
    folder.mkdir()
    for k in range(4):
        shutil.copy(places.pictures / f"{k:02d}.png", folder / f"{k}.png")
    if kind == "texts":
        (folder / "0.txt").write_text(own)
        (folder / "1.txt").write_text(blank)
    elif kind == "table":
        rows = [{"file_name": "0.png", "text": own}, {"file_name": "1.png", "text": blank}]
        rows.append({"file_name": "2.png", "text": None})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        table = {"image": [str(folder / f"{k}.png") for k in range(4)], "text": [own, blank, None, None]}
        folder = tmp_path / "set"
        datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).save_to_disk(folder)
    images = load_images(config(places, dataset=str(folder)), default_caption=prompt)
    assert [row.captions for row in images.rows] == [(own,), (prompt,), (prompt,), (prompt,)]
    with pytest.raises(UserError, match="--caption"):
        load_images(config(places, dataset=str(folder)))


def test_a_text_encoder_that_trains_is_not_cached(subject, capsys):
    subject("run", "--train-text-encoder")
    assert "text embeddings are not cached: the text encoder is trained" in capsys.readouterr().out


def test_defaults_are_those_of_the_method():
    assert DreamBoothConfig(dataset="d").learning_rate == 5e-6
    assert DreamBoothConfig(dataset="d", lora=True).learning_rate == 1e-4
    assert DreamBoothConfig(dataset="d", lora=True, learning_rate=3e-4).learning_rate == 3e-4
    assert "dreambooth" in contract.RECIPES
