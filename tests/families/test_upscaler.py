"""The upscaler as a base, beside its row in the contract: what it enlarges, and what it cannot do."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.cli import imported
from sdtune.config.commands import METHODS
from sdtune.models import families
from sdtune.run import usage
from sdtune.run.base_class import pipeline_class
from sdtune.sampling.generate import generate
from tests.conftest import status

PROMPT = "a red circle"
NEEDS = {"textual-inversion": {"placeholder_token": "<x>", "caption": None}, "lcm": {"lora": True}}


def recipe_of(method, base, dataset, out, **options):
    families.silence_libraries()
    settings = {"resolution": 32, "cache": False, "caption": "a", "output_dir": out} | NEEDS.get(method, {}) | options
    cfg = METHODS[method].load()(model=str(base), dataset=str(dataset), **settings)
    return imported(cfg.entry)(cfg, torch.device("cpu"))


def picture(file, side, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def stock(pipe, image, seed, **more):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator("cpu").manual_seed(seed)}
    return np.asarray(pipe(PROMPT, image=image, **options, **more).images[0])


def test_each_sample_draws_its_own_level_and_noise(bases, pictures, tmp_path):
    dataset = recipe_of("lora", bases("upscaler"), pictures, tmp_path).dataset(2, lambda line: None)
    items = [dataset[k] for k in range(24)]
    levels = [float(item["small_u"]) for item in items]
    assert len(set(levels)) == 24 and min(levels) < 0.2 and max(levels) > 0.8
    assert not any(torch.equal(items[0]["small_noise"], item["small_noise"]) for item in items[1:])
    assert all(item["small"].shape == (3, 8, 8) for item in items)


@pytest.mark.parametrize("method", ["dreambooth", "textual-inversion", "lcm"])
def test_other_methods_train_on_it(method, bases, pictures, tmp_path):
    recipe = recipe_of(method, bases("upscaler"), pictures, tmp_path)
    dataset = recipe.dataset(2, lambda line: None)
    loss = recipe(torch.utils.data.default_collate([dataset[0], dataset[1]]))
    (loss[0] if isinstance(loss, tuple) else loss).mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in recipe.parameters())


def test_a_run_with_previews_gives_the_picture_of_stock_diffusers(bases, pictures, tmp_path):
    run, small = tmp_path / "run", picture(tmp_path / "small.png", 12, 1)
    words = ["text-to-image", "--model", str(bases("upscaler")), "--dataset", str(pictures), "--resolution", "32"]
    words += ["--steps", "2", "--num-validation-images", "2", "--validation-inference-steps", "1"]
    words += ["--dataloader-num-workers", "0", "--train-batch-size", "1", "--learning-rate", "1e-2"]
    assert status([*words, "--output-dir", str(run)]) == 0
    assert list((run / "samples").glob("*.png"))
    assert 'image=load_image("...")' in (run / "README.md").read_text()
    ask = ["sample", "--model", str(run), "--prompt", PROMPT, "--steps", "2", "--seed", "5", "--image", str(small)]
    assert status([*ask, "--output-dir", str(tmp_path / "one")]) == 0
    ours = np.asarray(Image.open(tmp_path / "one" / "00000.png"))
    assert ours.shape == (48, 48, 3)
    assert np.array_equal(ours, stock(diffusers.DiffusionPipeline.from_pretrained(run), Image.open(small), 5))


def test_the_command_for_its_adapter_takes_a_picture(bases):
    kind = pipeline_class(str(bases("upscaler")), None, None)
    words = usage.sample(usage.ArtefactKind(adapter="a.safetensors"), "runs/a", "a photo", kind)
    assert words[2:] == ["--adapter", "runs/a", "--prompt", "a photo", "--image", "FILE"]


def test_pictures_of_two_sizes_keep_theirs(bases, tmp_path):
    """A stock call brings all images of a batch to the size of the first."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(bases("upscaler"))
    given = [Image.open(picture(tmp_path / f"{side}.png", side, side)) for side in (8, 12)]
    for level in ({}, {"noise_level": 0}):  # without one, that of the stock call
        options = {"steps": 2, "guidance_scale": 5.0, "images": [[image] for image in given], **level}
        drawn = generate(pipe, [PROMPT] * 2, [5, 6], **options)
        assert [image.size for image in drawn] == [(32, 32), (48, 48)]
        assert np.array_equal(np.asarray(drawn[1]), stock(pipe, given[1], 6, **level))


def test_what_it_cannot_do_is_refused(bases, pictures, tmp_path, capsys):
    base, out, small = bases("upscaler"), ["--output-dir", str(tmp_path / "no")], picture(tmp_path / "a.png", 8, 1)
    strange = shutil.copytree(base, tmp_path / "strange")
    index = json.loads((strange / "model_index.json").read_text())
    (strange / "model_index.json").write_text(json.dumps(index | {"max_noise_level": 400}))
    sample = ["sample", "--model", str(base), "--prompt", PROMPT, "--steps", "1"]
    data = ["--dataset", str(pictures), "--caption", "a", "--resolution", "32"]
    on_it = ["--model", str(base), *data]
    class_images = ["--prior-preservation", "--class-prompt", "a", "--class-data", str(tmp_path / "c")]
    for words, told in (
        (sample, "--image: a StableDiffusionUpscalePipeline enlarges an image; give one"),
        ([*sample, "--image", str(small), "--width", "32", "--height", "32"], "has no width, height: leave it out"),
        ([*sample, "--image", str(small), "--mask-image", str(small)], "is no inpainting model"),
        (["controlnet", *on_it, "--condition", "edges"], "gets no ControlNet here"),
        (["t2i-adapter", *on_it, "--condition", "edges"], "gets no T2I-Adapter here"),
        (["instruct-pix2pix", *on_it, "--original-image-column", "input_image"], "gets no InstructPix2Pix here"),
        (["custom-diffusion", *on_it], "gets no Custom Diffusion here"),
        (["dreambooth", *on_it, *class_images], "enlarges pictures, but makes none from a prompt"),
        (["lora", *on_it[:-1], "40"], "this base needs a multiple of 16"),
        (["lora", "--model", str(strange), *data], "its max_noise_level is 400; UNet or scheduler has 400"),
    ):
        assert status([*words, *out]) == 2, words
        assert told in capsys.readouterr().err
