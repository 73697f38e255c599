"""``sdtune t2i-adapter``: every feature is read, timesteps are cubic, and stock pipelines follow images with it."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.config.methods.t2i_adapter import T2IAdapterConfig
from sdtune.models import families
from sdtune.recipes.t2i_adapter import T2IAdapter
from tests.conftest import status
from tests.families import pipelines

LEARNT = ["--learning-rate", "0.1", "--steps", "4"]
PIPELINES = {"sd": diffusers.StableDiffusionAdapterPipeline, "sdxl": diffusers.StableDiffusionXLAdapterPipeline}


def sdxl_of_three_blocks():
    """Blocks as SDXL has them; the adapter for it has four levels."""
    pipe = pipelines.sdxl()
    config = dict(pipe.unet.config) | {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 1),
    }
    pipe.unet = diffusers.UNet2DConditionModel.from_config(config)
    return pipe


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    return pipelines.save(sdxl_of_three_blocks, tmp_path_factory.mktemp("bases") / "sdxl")


def recipe_of(base, pictures, tmp_path, **options):
    families.silence_libraries()
    settings = {"resolution": 32, "condition": "edges", "output_dir": tmp_path / "run", "cache": False} | options
    return T2IAdapter(T2IAdapterConfig(model=str(base), dataset=str(pictures), **settings), torch.device("cpu"))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_weight_gets_a_gradient_at_cubic_timesteps(name, request, pictures, tmp_path, monkeypatch):
    recipe = recipe_of(request.getfixturevalue(name), pictures, tmp_path)
    dataset, seen = recipe.dataset(2, lambda line: None), []
    batch = torch.utils.data.default_collate([dataset[0], dataset[1]])
    predict = recipe.family.predict
    monkeypatch.setattr(recipe.family, "predict", lambda x, t, c, **more: seen.append(t) or predict(x, t, c, **more))
    recipe(batch).mean().backward()
    assert [name for name, p in recipe.network.named_parameters() if p.grad is None or not p.grad.any()] == []
    expected = ((1 - batch["u"] ** 3) * 1000).long().clamp(max=999)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_stock_pipelines_give_the_image_of_sdtune_sample(name, request, shared, pictures, tmp_path):
    base = request.getfixturevalue(name)
    run = shared("t2i-adapter", "--model", str(base), *LEARNT)
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "c.png")

    def sampled(count, *controls):
        words = ["sample", "--model", str(base), "--prompt", "a red circle", "--steps", "3", "--seed", "5"]
        words += [
            "--image",
            *[str(tmp_path / "c.png")] * count,
            "--output-dir",
            str(tmp_path / f"{count}-{controls[0][-1]}"),
        ]
        assert status([*words, "--control", *controls]) == 0
        return np.asarray(Image.open(tmp_path / f"{count}-{controls[0][-1]}" / "00000.png"))

    def stock(adapter, image, scale):
        pipe = PIPELINES[name].from_pretrained(base, adapter=adapter)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "guidance_scale": 5.0, "adapter_conditioning_scale": scale}
        generator = torch.Generator("cpu").manual_seed(5)
        return np.asarray(pipe("a red circle", image=image, generator=generator, **options).images[0])

    adapter, image = diffusers.T2IAdapter.from_pretrained(run), Image.open(tmp_path / "c.png")
    ours = sampled(1, f"{run}=0.7")
    assert np.array_equal(ours, stock(adapter, image, 0.7))
    assert not np.array_equal(ours, sampled(1, f"{run}=0"))
    assert PIPELINES[name].__name__ in (run / "README.md").read_text()
    if name == "sd":
        both = diffusers.MultiAdapter([adapter, diffusers.T2IAdapter.from_pretrained(run)])
        assert np.array_equal(sampled(2, f"{run}=0.7", f"{run}=0.4"), stock(both, [image, image], [0.7, 0.4]))
        again = recipe_of(base, pictures, tmp_path, init_t2i_adapter=str(run)).network.state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in adapter.state_dict().items())


def test_what_does_not_fit_is_one_line(shared, sd, pictures, tmp_path, capsys):
    two_blocks = pipelines.save(pipelines.sdxl, tmp_path / "sdxl")
    words = ["t2i-adapter", "--dataset", str(pictures), "--condition", "blur", "--resolution", "32"]
    assert status([*words, "--model", str(two_blocks), "--output-dir", str(tmp_path / "run")]) == 2
    assert "needs the blocks of SDXL, not DownBlock2D, CrossAttnDownBlock2D" in capsys.readouterr().err
    run = shared("t2i-adapter", "--model", str(sd), *LEARNT)
    words = ["controlnet", *words[1:], "--init-controlnet", str(run), "--model", str(sd)]
    assert status([*words, "--output-dir", str(tmp_path / "run2")]) == 2
    assert "a T2IAdapter, not a ControlNetModel" in capsys.readouterr().err
