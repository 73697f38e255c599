"""Options of models of pixels: estimates out of range, guided previews, and the blocks of guided-diffusion."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from sdtune.config.methods.consistency import ConsistencyConfig
from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.config.sections import UserError
from sdtune.config.verbs import EvaluateConfig, SampleConfig
from sdtune.diffusion.noise_schedule import noise_scheduler
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.diffusion.schedulers import choose_scheduler, make_scheduler
from sdtune.evaluation.inputs import plan_of
from sdtune.models import pixel_models
from sdtune.recipes.ddpm import Ddpm
from tests.conftest import status

THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.99, "sample_max_value": 3.0}
ASKED = {"out_of_range": "threshold", "dynamic_thresholding_ratio": 0.99, "sample_max_value": 3.0}
WORDS = ["--out-of-range", "threshold", "--dynamic-thresholding-ratio", "0.99", "--sample-max-value", "3"]
SMALL = {"resolution": 16, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


# ---- estimates of the image outside [-1, 1] ------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_thresholding_is_that_of_the_stock_scheduler(name, pixels, tmp_path):
    words = ["sample", "--model", str(pixels), "--scheduler", name, "--steps", "3", "--seed", "2"]
    for folder, more in {"threshold": WORDS, "clip": [], "keep": ["--out-of-range", "keep"]}.items():
        assert status([*words, *more, "--output-dir", str(tmp_path / folder)]) == 0
    found = {f.name: np.asarray(Image.open(f / "00000.png")) for f in tmp_path.iterdir()}
    assert not any(np.array_equal(found["threshold"], found[other]) for other in ("clip", "keep"))
    pipe = DDPMPipeline.from_pretrained(pixels)
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[name]
    scheduler, generator = kind.from_config(pipe.scheduler.config, **THRESHOLD), torch.Generator().manual_seed(2)
    x = torch.randn(1, 3, 16, 16, generator=generator)
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(pipe.unet(x, t).sample, t, x, generator=generator).prev_sample
    assert np.array_equal(found["threshold"], np.asarray(to_images(x)[0]))


def test_it_is_the_papers_formula():
    """In the last step of DDIM, which gives the estimate itself: clipped to its quantile, and divided by it."""
    base = DDPMScheduler(prediction_type="sample")
    chosen = choose_scheduler("ddim", base, SampleConfig(model="m", **ASKED))
    chosen.set_timesteps(1)
    x0 = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    s = float(np.quantile(x0.abs().numpy(), 0.99))
    assert 1 < s < 3
    ours = chosen.step(x0, chosen.timesteps[0], torch.randn(1, 3, 8, 8)).pred_original_sample
    torch.testing.assert_close(ours, x0.clamp(-s, s) / s)


def test_a_run_keeps_it_in_its_scheduler_and_its_previews_have_it():
    plain, cfg = (DdpmConfig(dataset="d", **more) for more in ({}, ASKED))
    saved = noise_scheduler(cfg)
    assert {name: saved.config[name] for name in THRESHOLD} == THRESHOLD
    assert noise_scheduler(plain).config.thresholding is False
    assert make_scheduler("ddim", saved).config.thresholding
    kept = noise_scheduler(DdpmConfig(dataset="d", out_of_range="keep"), dict(saved.config))
    assert not kept.config.thresholding and not kept.config.clip_sample
    with pytest.raises(UserError, match="--scheduler euler knows no dynamic thresholding; add --out-of-range keep"):
        make_scheduler("euler", saved)
    choose_scheduler("euler", saved, SampleConfig(model="m", out_of_range="keep"))


def test_what_knows_no_such_range_says_so(pixels, sd, tmp_path, capsys):
    model = ["--model", str(pixels)]
    for words, said in (
        ([*model, "--scheduler", "euler", *WORDS], "--scheduler euler knows no dynamic thresholding"),
        ([*model, "--scheduler", "dpm++", "--out-of-range", "clip"], "--out-of-range clip: DPMSolver.* does not"),
        ([*model, "--dynamic-thresholding-ratio", "0.9"], "has no effect"),
        (["--model", str(sd), "--prompt", "x", *WORDS], "--out-of-range.*: not for a text-to-image model"),
    ):
        capsys.readouterr()
        assert status(["sample", *words, "--output-dir", str(tmp_path)]) == 2
        assert re.search(said, capsys.readouterr().err)


def test_evaluate_draws_so_too(pixels, pictures, tmp_path):
    cfg = EvaluateConfig(samples=str(pixels), reference=str(pictures), output_dir=tmp_path / "out", **ASKED)
    drawn = plan_of(cfg).sampling
    assert {name: getattr(drawn, name) for name in ASKED} == ASKED
    with pytest.raises(UserError, match="--out-of-range: for images that are drawn"):
        plan_of(cfg.model_copy(update={"samples": str(pictures)}))


# ---- guided previews -----------------------------------------------------------------------------------


def test_previews_are_guided_towards_their_classes(pictures):
    cfg = DdpmConfig(
        dataset=str(pictures), class_column="text", validation_guidance_scale=4, validation_inference_steps=2, **SMALL
    )
    recipe = Ddpm(cfg, torch.device("cpu"))
    names = recipe.classes[:2]
    shown, ddim = recipe.sample(names, [3, 4]), make_scheduler("ddim", recipe.scheduler)
    for scale, same in ((4.0, True), (1.0, False)):
        drawn = draw(recipe.unet, ddim, [3, 4], steps=2, labels=torch.tensor([0, 1]), guidance_scale=scale)
        images = to_images(drawn)
        pairs = zip(images, shown, strict=True)
        assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in pairs) == same


def test_guidance_of_previews_needs_classes_and_a_null_class():
    with pytest.raises(ValueError, match="validation_guidance_scale has no effect without class_column"):
        DdpmConfig(dataset="d", validation_guidance_scale=2)
    with pytest.raises(ValueError, match="guidance needs the null class"):
        DdpmConfig(dataset="d", class_column="folder", class_dropout=0, validation_guidance_scale=2)


# ---- the blocks of guided-diffusion --------------------------------------------------------------------


def test_the_network_of_guided_diffusion(tmp_path):
    """As diffusers has it: halving and doubling in residual blocks, scale and shift, heads by their channels."""
    options = {"attention_resolutions": [8], "attention_head_dim": 4, "resblock_updown": True}
    options |= {"block_out_channels": [8, 16, 16], "resnet_time_scale_shift": "scale_shift"}
    cfg = DdpmConfig(dataset="d", **SMALL | options)
    unet = pixel_models.build(cfg, pixel_models.plan(cfg), 3, [])
    unet.save_pretrained(tmp_path)
    stock = UNet2DModel.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["down_block_types"] == ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
    assert saved["up_block_types"] == ["ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
    assert (saved["downsample_type"], saved["upsample_type"]) == ("resnet", "resnet")
    blocks = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert sum(m.down for m in blocks) == sum(m.up for m in blocks) == 2
    assert all(m.time_embedding_norm == "scale_shift" for m in blocks)
    assert {m.heads for m in unet.modules() if type(m).__name__ == "Attention"} == {4}
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 700])
    unet(x, t).sample.sum().backward()
    assert all(p.grad is not None for p in unet.parameters())
    with torch.no_grad():
        torch.testing.assert_close(stock(x, t).sample, unet(x, t).sample)


def test_each_is_left_out_by_default_and_refused_beside_a_model():
    for kind in (DdpmConfig, ConsistencyConfig):
        described = pixel_models.plan(kind(dataset="d", **SMALL)).network
        assert not described.keys() & {"downsample_type", "upsample_type", "resnet_time_scale_shift"}
        for name, value in {"resblock_updown": True, "resnet_time_scale_shift": "scale_shift"}.items():
            with pytest.raises(ValueError, match=f"model describes the whole network: leave out {name}"):
                kind(dataset="d", model="m", **{name: value})
