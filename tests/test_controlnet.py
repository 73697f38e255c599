"""``sdtune controlnet``: it begins as the base, and stock pipelines follow images with what it writes."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.config.methods.controlnet import ControlNetConfig
from sdtune.models import families
from sdtune.recipes.controlnet import ControlNet
from sdtune.run import usage
from tests.conftest import status
from tests.families import pipelines
from tests.tinysd import save_tiny_sd

PROMPT = "a red circle"


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    return pipelines.save(pipelines.sdxl, tmp_path_factory.mktemp("bases") / "sdxl")


@pytest.fixture
def condition(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "condition.png")
    return tmp_path / "condition.png"


def recipe_of(base, pictures, tmp_path, **options):
    families.silence_libraries()
    settings = {"resolution": 32, "condition": "edges", "output_dir": tmp_path / "run", "cache": False} | options
    return ControlNet(ControlNetConfig(model=str(base), dataset=str(pictures), **settings), torch.device("cpu"))


def batch_of(recipe):
    dataset = recipe.dataset(2, lambda line: None)
    return torch.utils.data.default_collate([dataset[0], dataset[1]])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_before_the_first_step_the_model_is_the_base(name, request, pictures, tmp_path):
    recipe = recipe_of(request.getfixturevalue(name), pictures, tmp_path)
    batch, family = batch_of(recipe), recipe.family
    text, x_t, t = family.conditioning(batch), batch["noise"], torch.tensor([3, 700])
    residuals = recipe.residuals(x_t, t, text, batch["condition"])
    assert all(not r.any() for r in residuals["down_block_additional_residuals"])
    assert torch.equal(family.predict(x_t, t, text, **residuals), family.predict(x_t, t, text))
    recipe(batch).mean().backward()
    moved = {name.partition(".")[0] for name, p in recipe.network.named_parameters() if p.grad.any()}
    assert moved == {"controlnet_down_blocks", "controlnet_mid_block"}  # the zero convolutions come first
    assert all(p.grad is None for p in recipe.unet.parameters())


def sampled(tmp_path, *words):
    out = tmp_path / f"images-{len(list(tmp_path.iterdir()))}"
    assert status(["sample", "--prompt", PROMPT, "--steps", "3", "--seed", "5", "--output-dir", str(out), *words]) == 0
    return np.asarray(Image.open(out / "00000.png"))


def stock(base, networks, images, scales):
    """As the card says, for one network; several are lists."""
    one = len(networks) == 1
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(base, controlnet=networks[0] if one else networks)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "generator": torch.Generator("cpu").manual_seed(5)}
    options["controlnet_conditioning_scale"] = scales[0] if one else scales
    return np.asarray(pipe(PROMPT, image=images[0] if one else images, **options).images[0])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_stock_pipelines_give_the_image_of_sdtune_sample(name, request, shared, condition, tmp_path):
    base = request.getfixturevalue(name)
    run = shared("controlnet", "--learning-rate", "0.1", "--model", str(base), "--steps", "4")
    network, image = diffusers.ControlNetModel.from_pretrained(run), Image.open(condition)
    ours = sampled(tmp_path, "--control", f"{run}=0.7", "--image", str(condition))
    assert np.array_equal(ours, stock(base, [network], [image], [0.7]))
    assert not np.array_equal(
        ours, sampled(tmp_path, "--control", f"{run}=0", "--image", str(condition), "--model", str(base))
    )
    if name == "sdxl":
        return
    both = ["--control", f"{run}=0.7", f"{run}=0.4", "--image", str(condition), str(condition)]
    assert np.array_equal(sampled(tmp_path, *both), stock(base, [network] * 2, [image] * 2, [0.7, 0.4]))
    card = (run / "README.md").read_text()
    assert "AutoPipelineForText2Image.from_pretrained" in card and "ControlNetModel" in card
    assert usage.artefact_kind({n: run / n for n in ("config.json", "diffusion_pytorch_model.safetensors")}).control
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{PROMPT} --cn {condition}\n")
    words = ["sample", "--control", str(run), "--prompt-file", str(tmp_path / "prompts.txt"), "--steps", "1"]
    white = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(white)
    assert status([*words, "--image", str(white), "--output-dir", str(tmp_path / "lines")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "lines" / "prompts.jsonl").read_text().splitlines()]
    assert [line.get("image") for line in lines] == [str(white), str(condition)]


def test_a_run_continues_a_controlnet(sd, shared, pictures, tmp_path, trained):
    run = shared("controlnet", "--learning-rate", "0.1", "--model", str(sd), "--steps", "4")
    theirs = diffusers.ControlNetModel.from_pretrained(run).state_dict()
    ours = recipe_of(sd, pictures, tmp_path, init_controlnet=str(run)).network.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_paired_column_with_previews_in_bf16_with_checkpointing(sd, tmp_path, capsys):
    """Previews show the condition beside the sample; `check` has a figure."""
    (tmp_path / "pairs" / "conditioning_image").mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (40, 32), (k, 90, 0)).save(tmp_path / "pairs" / f"{k}.png")
        Image.new("RGB", (40, 32), (k, 0, 200)).save(tmp_path / "pairs" / "conditioning_image" / f"{k}.png")
    words = ["--dataset", str(tmp_path / "pairs"), "--model", str(sd), "--resolution", "32", "--caption", "x"]
    words += [
        "--steps",
        "2",
        "--train-batch-size",
        "2",
        "--dataloader-num-workers",
        "0",
        "--num-validation-images",
        "3",
    ]
    words += ["--mixed-precision", "bf16", "--gradient-checkpointing", "--validation-inference-steps", "1"]
    words += ["--validation-prompt", "one", "two"]
    out = tmp_path / "run"
    assert status(["controlnet", *words, "--output-dir", str(out)]) == 0
    from sdtune.run.contact_sheet import cells

    shown = cells(Image.open(out / "samples" / "step-000002.png"))
    assert [text for _, text in shown] == ["one", "two", "one"] and shown[0][0].size == (64, 32)
    assert [image.getpixel((0, 0)) for image, _ in shown] == [(0, 0, 200), (1, 0, 200), (2, 0, 200)]
    capsys.readouterr()
    assert status(["check", "controlnet", *words, "--output-dir", str(out)]) == 0
    assert "at the worst moment of a step" in capsys.readouterr().out


def test_the_image_is_halved_as_often_as_the_vae_halves(tmp_path, pictures):
    """A VAE of factor 8, as the published ones have."""
    base = save_tiny_sd(tmp_path / "sd8", vae_blocks=4, resolution=64)
    recipe = recipe_of(base, pictures, tmp_path, resolution=64)
    assert recipe.network.config.conditioning_embedding_out_channels == (16, 32, 96, 256)
    assert recipe(batch_of(recipe)).isfinite().all()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--control", "{run}"], "--image: each network of --control follows an image; give one"),
        (["--control", "{run}", "--image", "no.png"], "--image no.png: cannot be read"),
        (["--control", "{run}", "--image", "{c}", "{c}", "{c}"], "--image: 3 images for 1 prompts; give one for all"),
        (["--control", "{pictures}", "--image", "{c}"], "no folder or repository of a ControlNet or T2I-Adapter"),
        (["--image", "{c}", "--model", "{sd}"], "follows no image and edits none"),
        (["--control", "{run}", "--image", "{c}", "--model", "{sdxl}"], "made for another base"),
    ],
)
def test_what_cannot_be_followed_is_one_line(words, told, shared, sd, sdxl, pictures, condition, tmp_path, capsys):
    run = shared("controlnet", "--learning-rate", "0.1", "--model", str(sd), "--steps", "4")
    places = {"run": run, "c": condition, "pictures": pictures, "sd": sd, "sdxl": sdxl}
    words = [word.format(**places) for word in words]
    assert status(["sample", "--prompt", PROMPT, "--output-dir", str(tmp_path / "out"), "--steps", "1", *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "told"),
    [("chroma", "gets no ControlNet here"), ("other", "made for another base: its cross_attention_dim is 32")],
)
def test_a_base_that_does_not_fit_is_one_line(model, told, shared, sd, sdxl, pictures, tmp_path, capsys):
    more = []
    base = sdxl
    if model == "chroma":
        base = pipelines.save(pipelines.chroma, tmp_path / "chroma")
    else:
        more = [
            "--init-controlnet",
            str(shared("controlnet", "--learning-rate", "0.1", "--model", str(sd), "--steps", "4")),
        ]
    words = [
        "controlnet",
        "--model",
        str(base),
        "--dataset",
        str(pictures),
        "--condition",
        "blur",
        "--resolution",
        "32",
    ]
    assert status([*words, "--output-dir", str(tmp_path / "run"), *more]) == 2
    assert told in capsys.readouterr().err
