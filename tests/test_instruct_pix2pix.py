"""``sdtune instruct-pix2pix``: it begins as the base, drops what it says, and its stock pipeline edits."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sdtune.config.methods.instruct_pix2pix import InstructPix2PixConfig
from sdtune.models import families
from sdtune.models.networks import reshaped
from sdtune.recipes.instruct_pix2pix import DROPOUT, InstructPix2Pix
from tests import tars
from tests.conftest import status
from tests.families import pipelines
from tests.tinysd import tiny_unet

LEARNT = ["--learning-rate", "0.01", "--steps", "4"]


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    return pipelines.save(pipelines.sdxl, tmp_path_factory.mktemp("bases") / "sdxl")


def recipe_of(base, pictures, tmp_path, **options):
    families.silence_libraries()
    settings = {"resolution": 32, "output_dir": tmp_path / "run", "cache": False, "model": str(base)} | options
    return InstructPix2Pix(InstructPix2PixConfig(dataset=str(pictures), **settings), torch.device("cpu"))


def batch_of(recipe, count=2):
    dataset = recipe.dataset(count, lambda line: None)
    return torch.utils.data.default_collate([dataset[k] for k in range(count)])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_before_the_first_step_the_image_says_nothing(name, request, pictures, tmp_path):
    base = request.getfixturevalue(name)
    recipe = recipe_of(base, pictures, tmp_path)
    batch, family = batch_of(recipe), recipe.family
    text, x_t, t = family.conditioning(batch), batch["noise"], torch.tensor([3, 700])
    image = family.source_latents(batch["original"])
    ours = family.predict(torch.cat([x_t, image], 1), t, text)
    plain = families.load(recipe.cfg, torch.device("cpu"), torch.float32)
    assert torch.allclose(ours, plain.predict(x_t, t, text), atol=1e-6)
    assert torch.equal(image, plain.vae.encode(batch["original"]).latent_dist.mode())  # as the stock pipeline has it
    recipe(batch).mean().backward()
    assert recipe.unet.conv_in.weight.grad[:, 4:].any()


def test_one_number_decides_what_is_dropped(sd, pictures, tmp_path):
    """Of 1: p lose the instruction, p both, p the image, the rest nothing."""
    recipe = recipe_of(sd, pictures, tmp_path, conditioning_dropout=0.2)
    recipe.dataset(2, lambda line: None)
    u = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64)
    image, text = recipe.dropped(torch.ones(4, 4, 2, 2), {"embeds": torch.full((4, 77, 32), 9.0)}, u)
    assert [bool(x.any()) for x in image] == [True, False, False, True]
    assert [bool((x == 9).all()) for x in text["embeds"]] == [False, False, True, True]
    assert torch.equal(text["embeds"][0], recipe.family.encode([""])["embeds"][0])
    dataset = recipe.dataset(2, lambda line: None)
    drawn = torch.stack([dataset[k][DROPOUT] for k in range(8)])
    assert drawn.unique().numel() == 8 and torch.equal(drawn[3], dataset[3][DROPOUT])


def test_weights_of_a_reshaped_network_are_kept():
    unet = tiny_unet()
    wider = reshaped(unet, in_channels=8)
    theirs, ours = unet.state_dict(), wider.state_dict()
    assert (
        torch.equal(ours["conv_in.weight"][:, :4], theirs["conv_in.weight"]) and not ours["conv_in.weight"][:, 4:].any()
    )
    assert all(torch.equal(ours[name], x) for name, x in theirs.items() if name != "conv_in.weight")
    assert reshaped(unet.to("meta"), in_channels=8).conv_in.weight.shape == (16, 8, 3, 3)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_stock_pipeline_gives_the_image_of_sdtune_sample(name, request, shared, tmp_path):
    run = shared("instruct-pix2pix", "--model", str(request.getfixturevalue(name)), *LEARNT)
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    words = ["sample", "--model", str(run), "--image", str(tmp_path / "photo.png"), "--prompt", "red", "--seed", "5"]
    words += ["--steps", "3", "--image-guidance-scale", "1.2", "--guidance-scale", "4"]
    assert status([*words, "--output-dir", str(tmp_path / "out")]) == 0
    ours = np.asarray(Image.open(tmp_path / "out" / "00000.png"))
    pipe = DiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert "InstructPix2Pix" in type(pipe).__name__
    options = {"num_inference_steps": 3, "guidance_scale": 4, "image_guidance_scale": 1.2}
    generator = torch.Generator("cpu").manual_seed(5)
    stock = pipe("red", image=Image.open(tmp_path / "photo.png"), generator=generator, **options).images[0]
    assert np.array_equal(ours, np.asarray(stock))
    assert "image=load_image" in (run / "README.md").read_text()


def test_previews_and_the_estimate_and_what_is_refused(sd, pictures, tmp_path, capsys):
    words = ["--model", str(sd), "--dataset", str(pictures), "--resolution", "32", "--train-batch-size", "2"]
    words += [
        "--num-validation-images",
        "2",
        "--validation-inference-steps",
        "1",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    words += ["--steps", "1", "--dataloader-num-workers", "0", "--mixed-precision", "bf16", "--gradient-checkpointing"]
    assert status(["instruct-pix2pix", *words]) == 0
    assert Image.open(tmp_path / "run" / "samples" / "step-000001.png").width > 2 * 64
    assert status(["check", "instruct-pix2pix", *words]) == 0
    assert "at the worst moment of a step" in capsys.readouterr().out
    assert (
        status(["sample", "--model", str(tmp_path / "run"), "--prompt", "x", "--output-dir", str(tmp_path / "o")]) == 2
    )
    assert "edits an image; give one" in capsys.readouterr().err
    sd3 = pipelines.save(pipelines.sd3, tmp_path / "sd3")
    assert status(["instruct-pix2pix", *words[2:], "--model", str(sd3), "--overwrite"]) == 2
    assert "gets no InstructPix2Pix here" in capsys.readouterr().err


def test_shards_with_pairs_are_encoded_once(sd, tmp_path, capsys):
    """The moments of both images come from --shard-cache, with the flip of the sample; previews show the pixels."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        rows = []
        for k in range(3):
            one, other = (np.random.default_rng([shard, k, n]).integers(0, 256, (32, 32, 3), np.uint8) for n in (0, 1))
            files = {"png": tars.png(Image.fromarray(one)), "input_image.png": tars.png(Image.fromarray(other))}
            rows.append((f"{k:02}", files | {"txt": b"make it red"}))
        tars.pack(shards / f"{shard}.tar", *rows)
    words = ["instruct-pix2pix", "--model", str(sd), "--dataset", str(shards), "--resolution", "32", "--steps", "2"]
    words += ["--shard-cache", str(tmp_path / "kept"), "--random-flip", "--image-column", "image"]
    words += ["--train-batch-size", "2", "--stream-lanes", "1"]
    words += ["--num-validation-images", "1", "--validation-inference-steps", "1", "--dataloader-num-workers", "0"]
    assert status([*words, "--output-dir", str(tmp_path / "run")]) == 0
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 2
    settings = {"shard_cache": tmp_path / "kept", "random_flip": True, "stream_lanes": 1, "train_batch_size": 2}
    settings |= {"image_column": "image"}
    settings |= {"model": str(sd), "dataset": str(shards), "resolution": 32, "output_dir": tmp_path / "other"}
    recipe = InstructPix2Pix(InstructPix2PixConfig(**settings), torch.device("cpu"))
    dataset = recipe.dataset(2, lambda line: None)
    flips = set()
    for position in range(6):
        item, sample = dataset[position], dataset.stream[position]
        flips.add(sample.flip)
        for name, column in (("moments", None), ("original", "input_image")):
            with torch.no_grad():
                fresh = recipe.family.moments(dataset.pictures.pixels(sample, column)[None])[0]
            torch.testing.assert_close(item[name], fresh, rtol=1e-4, atol=1e-4)
    assert flips == {True, False}
