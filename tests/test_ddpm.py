"""``sdtune ddpm``: stock diffusers loads and samples what it writes; classes, channels, continuing, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from sdtune.config import fields, parsing
from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.data import Stream, load_images
from sdtune.data.buckets import training_shapes
from sdtune.data.pixel_dataset import PixelDataset
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.models import pixel_models
from sdtune.run.contact_sheet import cells
from tests import contract
from tests.conftest import status

FILES = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
FILES += ["unet/diffusion_pytorch_model.safetensors"]


def answer(capsys, words: list[str]) -> str:
    capsys.readouterr()
    assert status([*words, "--overwrite"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def ddpm(trained):
    return lambda name, *options: trained("ddpm", name, *options)


@pytest.fixture
def refused(places, tmp_path, capsys):
    """What ``sdtune ddpm`` answers to a mistake, in one line."""

    def run(*options: str) -> str:
        return answer(capsys, contract.command("ddpm", places, tmp_path / "refused", *options))

    return run


def picture(mode: str, seed: int, side: int = 20) -> Image.Image:
    bands = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, bands), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


def classified(folder: Path, names=("two", "ten", "nine"), each: int = 3, mode: str = "RGB") -> Path:
    """Pictures in folders named as their classes."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(each):
            picture(mode, 10 * number + k).save(folder / name / f"{k}.png")
    return folder


def images_of(pipeline, steps, seed=3):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipeline(batch_size=1, generator=generator, num_inference_steps=steps).images[0])


# ---- the artefact --------------------------------------------------------------------------------------


def test_stock_diffusers_samples_it_with_ddpm_and_with_ddim(shared):
    run = shared("ddpm")
    pipeline = DDPMPipeline.from_pretrained(run)
    ancestral = images_of(pipeline, 5)
    assert ancestral.shape == (16, 16, 3)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.config.clip_sample
    assert images_of(pipeline, 25).shape == (16, 16, 3)
    ours = draw(pipeline.unet, DDPMPipeline.from_pretrained(run).scheduler, [3], steps=5)
    assert np.array_equal(np.asarray(to_images(ours)[0]), ancestral)


def test_the_artefact_is_these_files_with_equal_bytes_in_equal_runs(shared, ddpm):
    one, other = shared("ddpm"), ddpm("other")
    listed = [f for f in FILES if (one / f).is_file()]
    assert listed == FILES
    assert not (one / "classes.json").exists()
    assert [f for f in FILES if (one / f).read_bytes() != (other / f).read_bytes()] == []


def test_it_holds_the_average(shared):
    averaged, last = (
        UNet2DModel.from_pretrained(shared("ddpm", *more), subfolder="unet") for more in ([], ["--no-use-ema"])
    )
    assert not torch.equal(averaged.conv_in.weight, last.conv_in.weight)
    assert {w.dtype for w in averaged.parameters()} == {torch.float32}


def test_schedule_and_variance_are_saved(shared, ddpm):
    given = {
        "num_train_timesteps": 200,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.001,
        "beta_end": 0.03,
        "prediction_type": "v_prediction",
        "variance_type": "fixed_large",
    }
    words = [word for name, value in given.items() for word in (fields.flag(name), str(value))]
    words += ["--steps", "1"]
    saved = json.loads((ddpm("run", *words) / "scheduler" / "scheduler_config.json").read_text())
    assert given.items() <= saved.items()
    assert saved["clip_sample"]
    assert not DDPMPipeline.from_pretrained(
        ddpm("free", "--out-of-range", "keep", "--steps", "1")
    ).scheduler.config.clip_sample
    plain = json.loads((shared("ddpm") / "scheduler" / "scheduler_config.json").read_text())
    paper = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    assert (
        paper | {"prediction_type": "epsilon", "variance_type": "fixed_small", "clip_sample": True}
    ).items() <= plain.items()


def test_zero_terminal_snr_samples_from_the_last_timestep(ddpm, refused):
    run = ddpm("run", "--rescale-betas-zero-snr", "--prediction-type", "v_prediction", "--steps", "1")
    scheduler = DDPMPipeline.from_pretrained(run).scheduler
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[-1] == 0
    assert "add --prediction-type v_prediction" in refused("--rescale-betas-zero-snr")


def test_a_failed_write_leaves_the_older_artefact(copied, monkeypatch):
    run = copied("ddpm", "run")
    before = {f: (run / f).read_bytes() for f in FILES}
    pipeline = DDPMPipeline.from_pretrained(run)
    monkeypatch.setattr(DDPMPipeline, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pixel_models.save(run, pipeline.unet, pipeline.scheduler, [])
    assert {f: (run / f).read_bytes() for f in FILES} == before
    assert not (run / ".new").exists()


def full_disk(self, folder, **_):
    (Path(folder) / "unet").mkdir()
    raise OSError(28, "No space left on device")


def test_training_lowers_the_loss_of_held_out_images(ddpm):
    run = ddpm("run", "--steps", "60", "--num-holdout-images", "3", "--validation-steps", "30")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["holdout_loss"] for line in lines if "holdout_loss" in line]
    assert len(held_out) == 3
    assert held_out[-1] < 0.8 * held_out[0]


def test_gradient_checkpointing_changes_nothing_but_memory(shared, ddpm):
    runs = shared("ddpm"), ddpm("other", "--gradient-checkpointing")
    one, other = (contract.RECIPES["ddpm"].artefact(run) for run in runs)
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-6


def test_bf16_trains_and_saves_in_fp32(ddpm):
    weights = contract.RECIPES["ddpm"].artefact(ddpm("run", "--mixed-precision", "bf16", "--steps", "2"))
    assert {w.dtype for w in weights.values()} == {torch.float32}


# ---- the network ---------------------------------------------------------------------------------------


def test_the_shipped_recipe_has_the_network_of_the_paper():
    cfg = parsing.resolve(DdpmConfig, "ddpm/cifar10", {}, [])
    with torch.device("meta"):
        unet = pixel_models.build(cfg, pixel_models.plan(cfg), 3, [])
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307  # 35.7 million, appendix B
    assert pixel_models.describe(unet) == (
        "network: 3 channels in and out, levels of 32, 16, 8, 4 pixels, attention at 16"
    )


@pytest.fixture
def bare(places, tmp_path):
    """The words of a short run whose network is not described by options."""

    def words(name: str, *options: str) -> list[str]:
        least = {"--dataset": places.pictures, "--output-dir": tmp_path / name, "--resolution": 16, "--steps": 1}
        least |= {"--train-batch-size": 2, "--dataloader-num-workers": 0, "--num-validation-images": 0}
        given = {option.partition("=")[0] for option in options}
        return ["ddpm", *(str(w) for pair in least.items() if pair[0] not in given for w in pair), *options]

    return words


def test_a_file_describes_the_network(shared, bare, tmp_path, capsys, refused):
    file = tmp_path / "network.json"
    file.write_bytes((shared("ddpm") / "unet" / "config.json").read_bytes())
    assert status(bare("second", "--unet-config", str(file))) == 0
    assert (tmp_path / "second" / "unet" / "config.json").read_bytes() == file.read_bytes()
    assert "leave out block_out_channels" in refused("--unet-config", str(file))
    mistakes = {
        '{"_class_name": "UNet2DConditionModel", "block_out_channels": [8]}': "not a UNet2DModel",
        '{"block_out_channels": [8], "in_channels": 3, "out_channels": 6}': "learned its variance, which only",
        '{"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"]}': "Must provide the same number",
        '{"block_out_channels": [8], "class_embed_type": "timestep"}': "class_embed_type timestep",
        "[]": "wants the config.json of a UNet2DModel",
        "{": "not JSON",
    }
    for text, told in mistakes.items():
        file.write_text(text)
        assert told in answer(capsys, bare("third", "--unet-config", str(file)))
    assert "No such file" in answer(capsys, bare("third", "--unet-config", str(tmp_path / "none.json")))
    assert "or continue it with --model" in answer(capsys, bare("third", "--unet-config", "google/ddpm-cifar10-32"))
    (tmp_path / "of-diffusers" / "unet").mkdir(parents=True)
    (tmp_path / "of-diffusers" / "unet" / "config.json").write_text('{"block_out_channels": [8, 8, 8, 8, 8, 8, 8, 8]}')
    said = answer(capsys, bare("third", "--unet-config", str(tmp_path / "of-diffusers")))
    assert "No such file" not in said  # a folder is read, and what it describes halves the images too often


def test_options_of_the_network_that_cannot_be(refused):
    assert "this network halves it 1 times, so it wants a multiple of 2" in refused("--resolution", "17")
    assert "--bucket-step 15: this network halves it" in refused("--buckets", "--bucket-step", "15")
    assert "norm_num_groups 3 does not divide 8" in refused("--norm-num-groups", "3")
    assert "--attention-head-dim 3 does not divide 16" in refused("--attention-head-dim", "3")
    assert "--beta-start 0.5 is not below --beta-end 0.02" in refused("--beta-start", "0.5")


def test_a_schedule_that_does_not_reach_noise_is_told(ddpm, capsys):
    ddpm("run", "--num-train-timesteps", "50", "--steps", "1")
    assert "the last of 50 timesteps still holds 60% of an image's variance" in capsys.readouterr().out


# ---- images of any mode --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_a_model_has_the_channels_of_its_images(mode, channels, ddpm, tmp_path):
    for k in range(3):
        picture(mode, k).save(tmp_path / f"{k}.png")
    run = ddpm("run", "--dataset", str(tmp_path), "--num-validation-images", "2", "--steps", "2")
    pipeline = DDPMPipeline.from_pretrained(run)
    assert pipeline.unet.config.in_channels == pipeline.unet.config.out_channels == channels
    image = to_images(draw(pipeline.unet, pipeline.scheduler, [0], steps=2))[0]
    assert image.mode == mode


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pixels_are_those_of_the_file(mode, tmp_path):
    image = picture(mode, 0, side=16)
    image.save(tmp_path / "a.png")
    cfg = DdpmConfig(dataset=str(tmp_path), resolution=16)
    stream = Stream(cfg, load_images(cfg, captions=False), 1, mode)
    shown = ((stream.pixels(stream[0]) + 1) * 127.5).round().byte().permute(1, 2, 0).squeeze(-1)
    assert np.array_equal(shown.numpy(), np.asarray(image))


def test_mixed_images_take_the_least_that_holds_all(ddpm, tmp_path):
    picture("L", 0).save(tmp_path / "a.png")
    picture("RGB", 1).save(tmp_path / "b.png")
    assert (
        UNet2DModel.from_pretrained(ddpm("one", "--dataset", str(tmp_path), "--steps", "1") / "unet").config.in_channels
        == 3
    )
    picture("LA", 2).save(tmp_path / "c.png")
    assert (
        UNet2DModel.from_pretrained(ddpm("two", "--dataset", str(tmp_path), "--steps", "1") / "unet").config.in_channels
        == 4
    )


def test_colour_and_transparency_go_only_when_asked(ddpm, bare, tmp_path, capsys):
    grey, coloured, clear = tmp_path / "grey", tmp_path / "coloured", tmp_path / "clear"
    for folder, mode in ((grey, "L"), (coloured, "RGB"), (clear, "LA")):
        folder.mkdir()
        for k in range(2):
            picture(mode, k).save(folder / f"{k}.png")
    model = ddpm("model", "--dataset", str(grey), "--steps", "1")
    continued = ["--model", str(model), "--dataset"]
    told = answer(capsys, bare("x", *continued, str(coloured)))
    assert "2 of 2 images have colour (0.png, 1.png), which a model of 1 channel cannot hold" in told
    assert told.endswith("--channels 1 turns them grey")
    told = answer(capsys, bare("x", *continued, str(clear)))
    assert told.endswith("--channels 1 puts them on white")
    assert status(bare("y", *continued, str(coloured), "--channels", "1")) == 0
    assert "images turned grey for --channels 1: 2" in capsys.readouterr().out
    assert "--channels 3: the model has 1" in answer(capsys, bare("x", *continued, str(grey), "--channels", "3"))


# ---- classes -------------------------------------------------------------------------------------------


def test_folders_are_classes(ddpm, tmp_path):
    options = ["--class-column", "folder", "--num-validation-images", "4", "--steps", "1"]
    run = ddpm("run", "--dataset", str(classified(tmp_path / "data")), *options)
    assert json.loads((run / "classes.json").read_text()) == ["nine", "ten", "two"]
    assert UNet2DModel.from_pretrained(run / "unet").config.num_class_embeds == 4
    assert DDPMPipeline.from_pretrained(run).unet.config.num_class_embeds == 4
    with Image.open(sorted((run / "samples").glob("*.png"))[-1]) as sheet:
        assert [caption for _, caption in cells(sheet)] == ["nine", "ten", "two", "nine"]


def test_whole_numbers_are_in_order_of_number(tmp_path):
    cfg = DdpmConfig(dataset=str(classified(tmp_path / "data", ("10", "9", "2"))), class_column="folder")
    assert load_images(cfg, captions=False, class_column="folder").classes == ["2", "9", "10"]


def test_classes_of_a_table_and_of_a_saved_dataset_are_the_same(tmp_path):
    import datasets

    folder = classified(tmp_path / "data")
    files = sorted(folder.rglob("*.png"))
    rows = [{"file_name": f.relative_to(folder).as_posix(), "kind": f.parent.name, "text": "a"} for f in files]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["ten", "two", "nine"]
    features = {"image": datasets.Image(), "kind": datasets.ClassLabel(names=names)}
    table = {"image": [str(f) for f in files], "kind": [names.index(f.parent.name) for f in files]}
    datasets.Dataset.from_dict(table, datasets.Features(features)).save_to_disk(tmp_path / "saved")
    found = [
        load_images(DdpmConfig(dataset=str(place), resolution=16), captions=False, class_column=column)
        for place, column in ((folder, "folder"), (folder, "kind"), (tmp_path / "saved", "kind"))
    ]
    assert found[0].classes == found[1].classes == found[2].classes == ["nine", "ten", "two"]
    labels = [[(row.sha256, row.label) for row in images.rows] for images in found]
    assert labels[0] == labels[1] == labels[2]
    assert found[0].fingerprint != load_images(DdpmConfig(dataset=str(folder)), captions=False).fingerprint


def test_a_share_of_labels_is_the_null_class_by_position(tmp_path):
    cfg = DdpmConfig(dataset=str(classified(tmp_path / "data")), resolution=16, num_holdout_images=2)
    images = load_images(cfg, captions=False, class_column="folder")
    stream = Stream(cfg, images, 4)
    plain, dropped = (PixelDataset(stream, images.classes, share) for share in (0.0, 0.25))
    true = [plain[p]["label"] for p in range(400)]
    assert [images.classes[label] for label in true[:50]] == [images.rows[stream[p].index].label for p in range(50)]
    labels = [dropped[p]["label"] for p in range(400)]
    assert all(label in (3, own) for label, own in zip(labels, true, strict=True))
    assert 0.17 < labels.count(3) / 400 < 0.33
    assert [dropped[p]["label"] for p in reversed(range(20))] == labels[19::-1]
    assert 3 not in [dropped[key]["label"] for key in dropped.holdout]


def test_what_is_wrong_with_classes(refused, ddpm, tmp_path, capsys, places):
    one = classified(tmp_path / "one", ("only",))
    assert "all images of" in (told := refused("--dataset", str(one), "--class-column", "folder"))
    assert told.endswith("have one class, only")
    assert "class_dropout has no effect without class_column: add --class-column" in refused("--class-dropout", "0.5")
    assert "has no metadata; `--class-column folder` takes" in refused("--dataset", str(one), "--class-column", "kind")
    assert "no such column in" in (told := refused("--class-column", "txet"))
    assert told.endswith("did you mean text?")
    stray = classified(tmp_path / "stray")
    picture("RGB", 0).save(stray / "stray.png")
    words = contract.command("ddpm", places, tmp_path / "x", "--dataset", str(stray), "--class-column", "folder")
    assert status(words) == 2
    assert "these are not\n  stray.png" in capsys.readouterr().err
    rows = [{"file_name": f"two/{k}.png", "kind": kind} for k, kind in enumerate(["a", None, 0.5])]
    half = classified(tmp_path / "half", ("two",))
    (half / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = contract.command("ddpm", places, tmp_path / "z", "--dataset", str(half), "--class-column", "kind")
    assert status(words) == 2
    told = capsys.readouterr().err
    assert "metadata.jsonl:2: the class is missing" in told
    assert "metadata.jsonl:3: the class is 0.5, neither a name nor a whole number" in told


# ---- continuing a model --------------------------------------------------------------------------------


def test_a_saved_model_is_continued(ddpm, bare, tmp_path):
    first = ddpm("first", "--num-train-timesteps", "400", "--variance-type", "fixed_large", "--steps", "1")
    still = ["--learning-rate", "1e-12", "--adam-weight-decay", "0", "--model", str(first)]
    assert status(bare("second", *still, "--prediction-type", "epsilon")) == 0
    second = tmp_path / "second"
    one, other = (contract.RECIPES["ddpm"].artefact(run) for run in (first, second))
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-7
    for file in ("scheduler/scheduler_config.json", "unet/config.json", "model_index.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()  # and no path of the first in it


def test_a_continued_model_keeps_its_classes_in_their_order(shared, ddpm, bare, tmp_path, capsys):
    data = ["--dataset", str(classified(tmp_path / "data")), "--class-column", "folder"]
    first = ddpm("first", *data, "--steps", "1")
    names = ["two", "nine", "ten"]
    (first / "classes.json").write_text(json.dumps(names))
    few = ["--dataset", str(classified(tmp_path / "few", ("nine", "two"))), "--class-column", "folder"]
    assert status(bare("second", "--model", str(first), *few)) == 0
    assert json.loads((tmp_path / "second" / "classes.json").read_text()) == names
    other = ["--dataset", str(classified(tmp_path / "other", ("nine", "six"))), "--class-column", "folder"]
    assert "six is not a class of --model" in answer(capsys, bare("x", "--model", str(first), *other))
    assert "the model has classes (3); name those of the images with --class-column" in answer(
        capsys, bare("x", "--model", str(first))
    )
    (first / "classes.json").write_text('["a", "b"]')
    assert "names 2 classes, but the network has 3" in answer(capsys, bare("x", "--model", str(first), *few))
    (first / "classes.json").unlink()
    assert "no classes.json that names them" in answer(capsys, bare("x", "--model", str(first), *few))
    plain = shared("ddpm")
    assert "has no classes; leave one of the two options out" in answer(capsys, bare("x", "--model", str(plain), *few))


def test_what_cannot_be_continued(bare, sd, tmp_path, capsys):
    assert "a StableDiffusionPipeline without a UNet2DModel" in answer(capsys, bare("x", "--model", str(sd)))
    assert "no model_index.json in that folder" in answer(capsys, bare("x", "--model", str(tmp_path)))
    assert "no such folder" in answer(capsys, bare("x", "--model", str(tmp_path / "none")))
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPM"]}')
    assert "a DDPMPipeline without a UNet2DModel" in answer(capsys, bare("x", "--model", str(tmp_path)))


# ---- the built-in digits -------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    cfg = DdpmConfig(dataset="digits", resolution=8)
    images = load_images(cfg, captions=False, class_column="folder")
    stream, truth = Stream(cfg, images, 1, "L"), load_digits()
    assert len(images.rows) == 1797
    assert {row.mode for row in images.rows} == {"L"}
    for index in range(0, 1797, 89):
        number = int(Path(images.rows[index].name).stem)
        levels = (stream.pixels(stream._unaugmented(index))[0] + 1) * 8
        assert np.array_equal(levels.round().numpy(), truth.images[number])
        assert images.rows[index].label == str(truth.target[number])


# ---- images that are not square ------------------------------------------------------------------------

WIDE = ["--width", "24", "--height", "16"]


def test_images_that_are_not_square_are_trained_and_sampled_at_their_size(ddpm, trained, places, tmp_path, capsys):
    run = ddpm("wide", *WIDE, "--num-validation-images", "2", "--validation-inference-steps", "2", "--use-ema")
    said = capsys.readouterr().out
    assert "levels of 24 x 16, 12 x 8 pixels" in said
    assert {cell.size for cell, _ in cells(Image.open(sorted((run / "samples").glob("*.png"))[-1]))} == {(24, 16)}
    pipe = DDPMPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2).images[0].size == (24, 16)
    judge = trained("classifier", "judge", *WIDE)
    out = tmp_path / "drawn"
    words = ["sample", "--model", str(run), "--steps", "2", "--output-dir", str(out), "--classifier", str(judge)]
    name = json.loads((judge / "classes.json").read_text())[0]
    assert status([*words, "--class", name]) == 0
    assert Image.open(out / "00000.png").size == (24, 16)
    square = trained("classifier", "square")
    assert "made for 16 pixels a side, the model for 24 x 16" in answer_of(
        capsys, ["sample", "--model", str(run), "--classifier", str(square), "--class", name, "--output-dir", str(out)]
    )
    assert "evaluation looks at squares" in answer_of(
        capsys, ["evaluate", str(out), "--reference", str(places.pictures), "--classifier", str(judge)]
    )


def answer_of(capsys, words: list[str]) -> str:
    capsys.readouterr()
    assert status(words) == 2
    return capsys.readouterr().err


def test_buckets_of_images_that_are_not_square(ddpm, capsys):
    """Each image gets the nearest shape of the same area; its own is one of them."""
    ddpm("wide", *WIDE, "--buckets", "--bucket-step", "8", "--steps", "2")
    assert "24 x 16: " in capsys.readouterr().out
    cfg = DdpmConfig(dataset="x", width=96, height=64, buckets=True, bucket_step=8)
    shapes = training_shapes(cfg)
    assert (96, 64) in shapes and (64, 96) in shapes
    assert all(0.85 * 96 * 64 <= width * height <= 96 * 64 for width, height in shapes)


def test_sizes_that_cannot_be_trained_are_refused(refused):
    assert "width and height: give both, or neither for a square of resolution" in refused("--width", "24")
    assert "--height 17: this network halves it" in refused("--width", "24", "--height", "17")
