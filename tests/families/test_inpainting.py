"""Inpainting models as bases: their holes, and what every method on a text-to-image base makes of them."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.cli import imported
from sdtune.config.commands import METHODS
from sdtune.models import families
from sdtune.models.networks import reshaped
from tests.conftest import status
from tests.families import pipelines
from tests.image_folders import paint, rows_to

PROMPT = "a red circle"


def inpainting(pipe, kind):
    """The pipeline of a text-to-image model with a UNet of nine channels, of which the new ones are random."""
    unet = reshaped(pipe.unet, in_channels=9)
    torch.nn.init.normal_(unet.conv_in.weight, std=0.1)
    parts = {name: part for name, part in pipe.components.items() if name not in ("safety_checker", "unet")}
    return kind(unet=unet, **parts, **({} if "XL" in kind.__name__ else {"safety_checker": None}))


@pytest.fixture(scope="module")
def bases(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd)
    inpainting(pipe, diffusers.StableDiffusionInpaintPipeline).save_pretrained(folder / "sd")
    pipelines.save(pipelines.sdxl, folder / "xl-text")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "xl-text")
    inpainting(pipe, diffusers.StableDiffusionXLInpaintPipeline).save_pretrained(folder / "sdxl")
    return folder


@pytest.fixture
def masked(tmp_path):
    """One picture whose left half is white in its mask."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    paint(tmp_path / "data" / "a.png", (32, 32), shade=200)
    mask.save(tmp_path / "data" / "a-is.png")
    rows_to(tmp_path / "data" / "metadata.jsonl", {"file_name": "a.png", "mask_file_name": "a-is.png", "text": "a"})
    return tmp_path / "data"


NEEDS = {
    "textual-inversion": {"placeholder_token": "<x>", "caption": None},
    "custom-diffusion": {"placeholder_token": ["<x>"], "caption": "a <x>"},
}
METHODS_ON = ("lora", "dreambooth", "text-to-image", "lcm", *NEEDS)


def recipe_of(method, base, dataset, out, **options):
    families.silence_libraries()
    kind = METHODS[method].load()
    settings = {"resolution": 32, "cache": False, "caption": "a", "output_dir": out} | NEEDS.get(method, {}) | options
    cfg = kind(model=str(base), dataset=str(dataset), **settings)
    return imported(cfg.entry)(cfg, torch.device("cpu"))


def batch_of(recipe, *positions):
    dataset = recipe.dataset(2, lambda line: None)
    return torch.utils.data.default_collate([dataset[p] for p in positions])


@pytest.mark.parametrize("method", METHODS_ON)
def test_every_method_trains_on_it(method, bases, pictures, tmp_path):
    recipe = recipe_of(method, bases / "sd", pictures, tmp_path)
    loss = recipe(batch_of(recipe, 0, 1))
    (loss[0] if isinstance(loss, tuple) else loss).mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in recipe.parameters())


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_hole_is_the_mask_and_the_denoiser_sees_the_rest(name, bases, masked, tmp_path):
    options = {"masked_loss": True, "mask_column": "mask"}
    recipe = recipe_of("lora", bases / name, masked, tmp_path, **options)
    batch = batch_of(recipe, 0)
    hole = torch.arange(32).lt(16).float().expand(1, 1, 32, 32)
    assert torch.equal(batch["hole"], hole)
    assert not batch["kept"][..., :16].any() and torch.equal(batch["kept"][..., 16:], batch["pixels"][..., 16:])
    cond = recipe.family.conditioning(batch)
    assert cond["hole"].shape == (1, 5, 16, 16) and torch.equal(cond["hole"][0, 0], hole[0, 0, ::2, ::2])
    told = recipe.family.inputs(batch["noise"], torch.tensor([5]), cond)["sample"]
    assert torch.equal(told, torch.cat([batch["noise"], cond["hole"]], 1))


def test_without_masks_holes_are_drawn_and_some_are_all_of_it(bases, pictures, tmp_path):
    recipe = recipe_of("lora", bases / "sd", pictures, tmp_path)
    areas = [float(batch_of(recipe, p)["hole"].mean()) for p in range(24)]
    assert 1 < areas.count(1.0) < 16 and all(0.1 < area < 0.45 for area in areas if area < 1) and len(set(areas)) > 8


def stock(run, image, mask):
    pipe = diffusers.DiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    size = {"width": image.width, "height": image.height, "strength": 1.0}
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator("cpu").manual_seed(5)}
    return np.asarray(pipe(PROMPT, image=image, mask_image=mask, **size, **options).images[0])


def test_a_run_gives_the_picture_of_stock_diffusers(bases, masked, tmp_path, capsys):
    run = tmp_path / "run"
    words = [
        "text-to-image",
        "--model",
        str(bases / "sd"),
        "--dataset",
        str(masked),
        "--resolution",
        "32",
        "--steps",
        "2",
    ]
    words += ["--num-validation-images", "1", "--validation-inference-steps", "1", "--dataloader-num-workers", "0"]
    assert status([*words, "--output-dir", str(run), "--learning-rate", "1e-2", "--train-batch-size", "1"]) == 0
    assert status(["check", *words, "--output-dir", str(tmp_path / "none")]) == 0
    card = (run / "README.md").read_text()
    assert "mask_image=mask" in card and "A `StableDiffusionInpaintPipeline`" in card
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture, mask = tmp_path / "picture.png", masked / "a-is.png"
    Image.fromarray(pixels).save(picture)
    ask = ["sample", "--model", str(run), "--prompt", PROMPT, "--steps", "2", "--seed", "5"]
    given = ["--image", str(picture), "--mask-image", str(mask)]
    assert status([*ask, *given, "--output-dir", str(tmp_path / "one")]) == 0
    ours = np.asarray(Image.open(tmp_path / "one" / "00000.png"))
    assert np.array_equal(ours, stock(run, Image.open(picture).convert("RGB"), Image.open(mask).convert("RGB")))
    assert status([*ask, "--output-dir", str(tmp_path / "whole")]) == 0  # all of a picture
    capsys.readouterr()
    for words, told in (
        (given[:2], "--mask-image: an inpainting model paints where a mask is white"),
        ([*given, str(mask)], "--mask-image: 2 masks for 1 images"),
        ([*given, "--model", "tiny"], "is no inpainting model"),
    ):
        assert status([*ask, *words, "--output-dir", str(tmp_path / "no")]) == 2
        assert told in capsys.readouterr().err
    condition = ["controlnet", "--model", str(bases / "sd"), "--dataset", str(masked), "--condition", "edges"]
    assert status([*condition, "--resolution", "32", "--caption", "x", "--output-dir", str(tmp_path / "no")]) == 2
    assert "gets no ControlNet here" in capsys.readouterr().err
