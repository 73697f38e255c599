"""``sdtune super-resolution``: its inputs, its artefact in the stock pipeline, and cascades of ``sdtune sample``."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, IFSuperResolutionPipeline
from PIL import Image

from sdtune.config.methods.super_resolution import SuperResolutionConfig
from sdtune.config.sections import UserError
from sdtune.data.further import shrunk, to_image
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.recipes.super_resolution import SuperResolution
from sdtune.run import stock_lines, usage
from sdtune.run.sampling_file import Sampling
from sdtune.sampling.enlarge import NEXT
from tests.conftest import status

SMALL = {"resolution": 16, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def recipe_of(pictures, **settings):
    cfg = SuperResolutionConfig(dataset=str(pictures), **SMALL | settings)
    recipe = SuperResolution(cfg, torch.device("cpu"))
    return recipe, recipe.dataset(2, lambda line: None)


def batch_of(data, positions=(0, 1)):
    items = [data[p] for p in positions]
    names = items[0].keys() - {"name"}
    return {name: torch.stack([item[name] for item in items]) for name in names}


@pytest.fixture(scope="module")
def run(shared):
    return shared("super-resolution", "--steps", "2", "--validation-inference-steps", "2")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two small images, of two sizes."""
    folder, numbers = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for name, size in {"a.png": (4, 4, 3), "b.png": (3, 6, 3)}.items():
        Image.fromarray(numbers.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    return folder


def stock(run, image, seed, level=0, steps=2):
    pipe = IFSuperResolutionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt_embeds": torch.zeros(1, 1, 1), "guidance_scale": 1.0, "noise_level": level}
    call |= {"width": 4 * image.width, "height": 4 * image.height, "num_inference_steps": steps}
    return pipe(image=image, generator=torch.Generator().manual_seed(seed), **call).images[0]


def pixels_of(file):
    return np.asarray(Image.open(file) if not isinstance(file, Image.Image) else file).astype(int)


# ---- training ------------------------------------------------------------------------------------------


def test_the_network_is_told_what_the_stock_call_tells_it(pictures):
    """The small image, enlarged and noised, and its level: the same numbers as the pipeline makes of them."""
    recipe, data = recipe_of(pictures, max_noise_level=700)
    batch, told = batch_of(data), []
    recipe.unet = None
    recipe.unet = Heard(told)
    recipe(batch)
    (x, t, options) = told[0]
    levels = (batch["small_u"] * 701).long()
    assert torch.equal(options["class_labels"], levels) and levels[0] != levels[1]
    assert not options["encoder_hidden_states"].any()
    enlarged = torch.nn.functional.interpolate(batch["small"], (16, 16), mode="bilinear", align_corners=True)
    noised = recipe.scheduler.add_noise(enlarged, batch["small_noise"], levels)
    torch.testing.assert_close(x[:, 3:], noised, atol=1e-6, rtol=0)
    x_t = recipe.scheduler.add_noise(batch["pixels"], batch["noise"], t)
    torch.testing.assert_close(x[:, :3], x_t, atol=1e-6, rtol=0)
    assert batch["small"].shape[-2:] == (4, 4)
    again = batch_of(recipe_of(pictures, max_noise_level=700)[1])
    assert all(torch.equal(again[name], batch[name]) for name in batch)


class Heard(torch.nn.Module):
    """A network that notes what it is told, and says nothing."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def forward(self, x, t, **options):
        self.told.append((x, t, options))
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_no_level_is_above_the_highest(pictures):
    _, data = recipe_of(pictures, max_noise_level=0)
    assert all((batch_of(data, (p,))["small_u"] * 1).long() == 0 for p in range(5))
    recipe, _ = recipe_of(pictures, max_noise_level=4, num_train_timesteps=5)
    assert recipe.cfg.max_noise_level == 4
    with pytest.raises(UserError, match="--max-noise-level 5: the last timestep is 4"):
        recipe_of(pictures, max_noise_level=5, num_train_timesteps=5)


def test_attention_is_as_in_ddpm(pictures):
    """One head of all channels where none is asked for, and levels by their side."""
    for width, given in ((16, {}), (4, {"attention_head_dim": 4})):
        unet = recipe_of(pictures, attention_resolutions=[8], **given)[0].unet
        assert list(unet.config.down_block_types) == ["DownBlock2D", "AttnDownBlock2D"]
        assert unet.down_blocks[1].attentions[0].heads == 16 // width


def test_the_grid_shows_small_images_beside_the_enlarged(pictures, small):
    recipe, data = recipe_of(
        pictures, validation_image=[small / "a.png", small / "b.png"], validation_inference_steps=2
    )
    recipe.train()
    drawn = recipe.sample(data.prompts, [3, 4])
    assert [image.size for image in drawn] == [(16, 16), (24, 12)] and recipe.unet.training
    assert np.array_equal(pixels_of(data.prompts[1].images[0]), pixels_of(small / "b.png"))
    _, data = recipe_of(pictures, num_validation_images=2)
    assert [prompt.images[0].size for prompt in data.prompts] == [(4, 4)] * 2


# ---- the artefact --------------------------------------------------------------------------------------


def test_the_stock_pipeline_gives_the_same_picture(run, small, tmp_path):
    words = ["sample", "--model", str(run), "--image", str(small / "a.png"), "--seed", "7", "--batch-size", "1"]
    words += ["--image", str(small / "b.png"), "--noise-level", "100"]
    assert status([*words, "--output-dir", str(tmp_path)]) == 0
    for k, name in enumerate(("a.png", "b.png")):
        theirs = stock(run, Image.open(small / name), 7 + k, level=100)
        assert np.array_equal(pixels_of(tmp_path / f"{k:05d}.png"), pixels_of(theirs))
    record = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[1])
    assert (record["seed"], record["image"]) == (8, str(small / "b.png"))
    assert "Noise level: 100" in Image.open(tmp_path / "00000.png").info["parameters"]


def test_the_card_tells_how(run, small):
    kind = usage.artefact_kind({str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()})
    assert usage.sample(kind, "r", "p") == ["sdtune", "sample", "--model", "r", "--image", "FILE"]
    assert kind.edits and not kind.takes_text
    code, known = stock_lines.lines(kind, str(run), None, "", None, "p", None), {}
    seeded = code.replace("image=small", "image=small, generator=torch.Generator().manual_seed(2)")
    exec(seeded.replace("...", str(small / "b.png")), known)
    assert np.array_equal(pixels_of(known["image"]), pixels_of(stock(run, Image.open(small / "b.png"), 2)))


def test_a_cascade_enlarges_what_was_drawn(run, pixels, tmp_path):
    words = ["sample", "--model", str(pixels), "--steps", "2", "--seed", "5", "--batch-size", "1", "--noise-level", "9"]
    first = DDPMPipeline.from_pretrained(pixels)
    for stages, count, side in ((1, 2, 64), (2, 1, 256)):
        out = tmp_path / str(side)
        more = ["--then", *[str(run)] * stages, "--num-images", str(count), "--output-dir", str(out)]
        assert status([*words, *more]) == 0
        for k in range(count):
            image = to_images(draw(first.unet, first.scheduler, [5 + k], steps=2))[0]
            for further in range(stages):
                image = stock(run, image, 5 + k + (further + 1) * NEXT, level=9)
            assert image.size == (side, side)
            assert np.array_equal(pixels_of(out / f"{k:05d}.png"), pixels_of(image))


def test_other_samplers_and_variances(run, small, tmp_path):
    words = ["sample", "--model", str(run), "--image", str(small / "a.png"), "--steps", "2"]
    found = []
    for more in ([], ["--scheduler", "ddim"], ["--scheduler", "dpm++"], ["--variance-type", "learned_range"]):
        assert status([*words, *more, "--output-dir", str(tmp_path / "-".join(more))]) == 0
        found.append(pixels_of(tmp_path / "-".join(more) / "00000.png"))
    assert not any(np.array_equal(found[0], other) for other in found[1:])
    pipe = IFSuperResolutionPipeline.from_pretrained(run)
    assert pipe.scheduler.config.variance_type == "fixed_small"
    assert pipe.image_noising_scheduler.config.variance_type == "learned_range"


# ---- mistakes ------------------------------------------------------------------------------------------


def test_mistakes_of_sampling(run, pixels, sd, small, pictures, tmp_path, capsys):
    image = ["--image", str(small / "a.png")]
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in run.iterdir():
        if path.name != "sampling.json" and (path.is_dir() or path.suffix == ".json"):
            (bare / path.name).symlink_to(path)
    for words, said in (
        (["--model", str(run)], "--image: .* enlarges an image; give one"),
        (["--model", str(run), *image, "--prompt", "x"], "--prompt: .* reads no text"),
        (["--model", str(run), *image, "--noise-level", "401"], "--noise-level 401: .* was trained up to 400"),
        (["--model", str(run), *image, "--guidance-scale", "2"], "--guidance-scale: not for a model that enlarges"),
        (["--model", str(run), *image, "--scheduler", "euler"], "--scheduler euler: scales what it is given"),
        (["--model", str(run), *image, "--steps", "1001"], "--steps 1001: .* has 1000 timesteps"),
        (["--model", str(bare), *image], "no model that enlarges, with a factor in its sampling.json"),
        (["--model", str(pixels), "--noise-level", "3"], "--noise-level: is for models that enlarge"),
        (["--model", str(pixels), "--then", str(pixels)], "--then .*: no model that enlarges"),
        (["--model", str(pixels), "--then", "none/a/b"], "--then none/a/b: no such folder"),
        (["--model", str(sd), "--prompt", "x", "--noise-level", "3"], "has no noise_level: leave it out"),
        (["--prompt", "x", "--then", "r", "--xy", "seed=1,2", "guidance=1,2"], "xy and then"),
    ):
        capsys.readouterr()
        assert status(["sample", *words, "--output-dir", str(tmp_path / "out")]) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(said, line), line
    words = [
        "evaluate",
        str(run),
        "--reference",
        str(pictures),
        "--resamples",
        "0",
        "--output-dir",
        str(tmp_path / "scores"),
    ]
    assert status(words) == 2 and "enlarges images, and draws none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": 18}, "--resolution 18: wants a multiple of --factor 4"),
        ({"width": 18, "height": 16}, "--width 18: wants a multiple of --factor 4"),
        ({"buckets": True, "bucket_step": 10}, "--bucket-step 10: wants a multiple of --factor 4"),
        ({"prediction_type": "sample"}, "samples become alike"),
        ({"resolution": 20, "block_out_channels": [8, 8, 8, 8]}, "--resolution 20: this network halves it 3 times"),
        ({"validation_image": ["{none}"]}, "--validation-image .*none.png: cannot be read"),
    ],
)
def test_what_cannot_be_trained(settings, said, pictures, tmp_path):
    settings = {k: [tmp_path / "none.png"] if v == ["{none}"] else v for k, v in settings.items()}
    with pytest.raises(UserError, match=said):
        assert recipe_of(pictures, **settings)[1].prompts


def test_a_foreign_sampling_file_is_checked(tmp_path):
    for text in ('{"steps": 5, "factor": 1}', '{"steps": 5, "factor": 2.5}', '{"steps": 5, "max_noise_level": -1}'):
        (tmp_path / "sampling.json").write_text(text)
        with pytest.raises(UserError, match="says nothing that this version knows"):
            Sampling.read(tmp_path / "sampling.json")
    how = Sampling(5, call={"noise_level": 3}, factor=4, max_noise_level=9)
    how.write(tmp_path)
    assert Sampling.read(tmp_path / "sampling.json") == how


def test_small_images_have_no_aliases(pictures):
    """Stripes one pixel wide become grey, and not stripes."""
    _, data = recipe_of(pictures)
    stripes = torch.ones(3, 16, 16)
    stripes[:, :, ::2] = -1
    assert shrunk(stripes, 4).abs().max() < 0.2
    item = data[0]
    assert torch.equal(item["small"], shrunk(item["pixels"], 4))
    assert to_image(item["small"]).size == (4, 4)
