"""``sdtune text-to-image``: a whole pipeline, which stock diffusers draws from, and DREAM against diffusers' own."""

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_dream_and_update_latents
from PIL import Image
from safetensors.torch import load_file

from sdtune.diffusion.objective import DDPM, dream
from tests import contract
from tests.conftest import status

PROMPT = "a red circle"


def stock(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    return np.asarray(pipeline(PROMPT, num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0])


def ours(tmp_path, *options):
    out = tmp_path / "images"
    words = ["sample", *options, "--prompt", PROMPT, "--steps", "4", "--seed", "5", "--guidance-scale", "5"]
    assert status([*words, "--output-dir", str(out)]) == 0
    return np.asarray(Image.open(sorted(out.glob("0*.png"))[-1]))


def test_stock_diffusers_gives_the_picture_of_sdtune_sample(shared, sd, tmp_path):
    run = shared("text-to-image", "--steps", "4")
    assert np.array_equal(ours(tmp_path, "--model", str(run)), stock(run))
    assert np.array_equal(ours(tmp_path, "--model", str(sd), "--unet", str(run)), stock(run))
    assert not np.array_equal(stock(run), stock(sd)), "training changed nothing"


def test_every_weight_of_the_denoiser_moves_and_no_other(shared, sd):
    run = shared("text-to-image", "--steps", "4")
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(sd / file), load_file(run / file)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[k], after[k]) for k in before)
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (load_file(folder / f"{part}.safetensors") for folder in (sd, run))
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_half_precision_saves_a_pipeline_of_fp32(trained, sd):
    run = trained("text-to-image", "run", "--mixed-precision", "bf16", "--num-validation-images", "1", "--steps", "2")
    for file in sorted(run.glob("*/*.safetensors")):
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float32}, file
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert all(torch.equal(load_file(run / vae)[k], t) for k, t in load_file(sd / vae).items())


def test_dream_is_that_of_diffusers():
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, noise = torch.randn(2, 3, 4, 8, 8).unbind(0)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    objective = DDPM(scheduler.alphas_cumprod)
    t = objective.timesteps(u)

    class Unet(torch.nn.Module):
        def forward(self, x, t, text):
            return type("Out", (), {"sample": (0.3 * x + 0.1 * t.view(-1, 1, 1, 1) / 1000).sin()})

    x_t = scheduler.add_noise(x0, noise, t)
    want_x, want_target = compute_dream_and_update_latents(
        Unet(), scheduler, t, noise, x_t.clone(), noise.clone(), None, dream_detail_preservation=0.7
    )
    got = dream(objective, lambda x, t: Unet()(x, t, None).sample, x0, {"u": u, "noise": noise}, 0.7)
    assert torch.allclose(objective.noise(x0, got, t), want_x, atol=1e-5)
    assert torch.allclose(objective.target(x0, got, t), want_target, atol=1e-5)


def test_dream_asks_for_the_same_rectified_step_whatever_the_network_regresses():
    """A network that says the same in another parametrisation gets the same noise."""
    torch.manual_seed(0)
    alphas = DDPMScheduler().alphas_cumprod
    x0, noise, says = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64).unbind(0)
    batch = {"u": torch.tensor([0.2, 0.7], dtype=torch.float64), "noise": noise}
    plain = DDPM(alphas)
    t = plain.timesteps(batch["u"])
    a, s = plain.scales(t, x0)
    x_t = plain.noise(x0, noise, t)
    x_said = (x_t - s * says) / a
    told = {"epsilon": says, "v_prediction": a * says - s * x_said, "sample": x_said}
    got = [dream(DDPM(alphas, kind), lambda *_, told=told[kind]: told, x0, batch, 1.0) for kind in told]
    assert torch.allclose(got[0], got[1]) and torch.allclose(got[0], got[2])


def test_dream_with_input_perturbation_is_refused(places, tmp_path, capsys):
    words = contract.command("text-to-image", places, tmp_path / "run", "--dream", "--input-perturbation", "0.1")
    assert status(words) == 2
    assert "dream and input_perturbation" in capsys.readouterr().err
