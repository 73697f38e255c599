"""ControlNets of Stable Diffusion 3 and FLUX.1, which follow the latents of an image."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.config.methods.controlnet import ControlNetConfig
from sdtune.models import families
from sdtune.recipes.controlnet import ControlNet
from tests.conftest import status
from tests.families import pipelines

PROMPT = "a red circle"
CLASSES = {"sd3": "SD3ControlNetModel", "flux": "FluxControlNetModel"}


@pytest.fixture(scope="module", params=CLASSES)
def base(request, tmp_path_factory):
    make = getattr(pipelines, request.param)
    return pipelines.save(make, tmp_path_factory.mktemp("bases") / request.param)


@pytest.fixture(scope="module")
def run(base, pictures, tmp_path_factory):
    """A run with everything on: a paired column, bf16, checkpointing, previews."""
    out = tmp_path_factory.mktemp("runs") / base.name
    words = ["controlnet", "--model", str(base), "--dataset", str(pictures), "--resolution", "32", "--steps", "2"]
    words += ["--conditioning-image-column", "input_image", "--learning-rate", "0.5", "--train-batch-size", "2"]
    words += ["--mixed-precision", "bf16", "--gradient-checkpointing", "--num-validation-images", "1"]
    words += ["--validation-inference-steps", "1", "--dataloader-num-workers", "0", "--output-dir", str(out)]
    assert status(words) == 0
    assert status(["check", *words]) == 0
    return out


def recipe_of(base, pictures, tmp_path, **options):
    families.silence_libraries()
    settings = {"resolution": 32, "condition": "edges", "output_dir": tmp_path / "run", "cache": False} | options
    return ControlNet(ControlNetConfig(model=str(base), dataset=str(pictures), **settings), torch.device("cpu"))


def test_before_the_first_step_the_model_is_the_base_and_every_weight_learns(base, pictures, tmp_path):
    recipe = recipe_of(base, pictures, tmp_path)
    dataset, family = recipe.dataset(2, lambda line: None), recipe.family
    batch = torch.utils.data.default_collate([dataset[0], dataset[1]])
    text, x_t, t = family.conditioning(batch), batch["noise"], torch.tensor([0.1, 0.7])
    residuals = recipe.residuals(x_t, t, text, batch["condition"])
    assert all(not r.any() for added in residuals.values() for r in added)
    assert torch.equal(family.predict(x_t, t, text, **residuals), family.predict(x_t, t, text))
    recipe(batch).mean().backward()
    assert [name for name, p in recipe.network.named_parameters() if p.requires_grad and p.grad is None] == []
    moved = {
        name.partition(".")[0] for name, p in recipe.network.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert moved <= {"controlnet_blocks", "controlnet_single_blocks"} and moved  # the zero layers come first
    assert all(p.grad is None for p in recipe.transformer.parameters())


def stock(base, networks, image, scales):
    """As the card says, for one network; several are lists."""
    one = len(networks) == 1
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(base, controlnet=networks[0] if one else networks)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "width": 32, "height": 32}
    options |= {"controlnet_conditioning_scale": scales[0] if one else scales}
    torch.manual_seed(5)  # the pipeline of Stable Diffusion 3 draws the latent of its image by torch's own draws
    generator = torch.Generator("cpu").manual_seed(5)
    followed = image if one else [image] * len(networks)
    return np.asarray(pipe(PROMPT, control_image=followed, generator=generator, **options).images[0])


def test_stock_pipelines_give_the_image_of_sdtune_sample(base, run, tmp_path):
    network = getattr(diffusers, CLASSES[base.name]).from_pretrained(run)
    assert json.loads((run / "config.json").read_text())["_class_name"] == CLASSES[base.name]
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "condition.png")

    def sampled(*controls):
        out = tmp_path / f"images-{len(controls)}-{controls[0][-1]}"
        words = [
            "sample",
            "--prompt",
            PROMPT,
            "--steps",
            "2",
            "--seed",
            "5",
            "--control",
            *(f"{run}={c}" for c in controls),
        ]
        words += ["--image", *[str(tmp_path / "condition.png")] * len(controls), "--output-dir", str(out)]
        assert status(words) == 0
        return np.asarray(Image.open(out / "00000.png"))

    one = sampled("0.7")
    assert np.array_equal(one, stock(base, [network], image, [0.7]))
    assert np.array_equal(sampled("0.7", "0.4"), stock(base, [network] * 2, image, [0.7, 0.4]))
    assert not np.array_equal(one, sampled("0"))
    card = (run / "README.md").read_text()
    assert f"{CLASSES[base.name]}.from_pretrained" in card and "control_image=followed, width=followed.width" in card
    assert "A ControlNet on" in card


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_layers": 9}, "--num-layers 9: of so many blocks this base, which has"),
        ({"init_controlnet": "{run}", "model": "{other}"}, "not a "),
    ],
)
def test_a_network_that_does_not_fit_is_told(options, told, base, run, pictures, tmp_path):
    places = {"run": run, "other": "tiny"}
    options = {name: value.format(**places) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(families.UserError, match=told):
        recipe_of(options.pop("model", base), pictures, tmp_path, **options)


def test_a_run_goes_on_from_another(base, run, pictures, tmp_path):
    theirs = getattr(diffusers, CLASSES[base.name]).from_pretrained(run).state_dict()
    ours = recipe_of(base, pictures, tmp_path, init_controlnet=str(run)).network.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
