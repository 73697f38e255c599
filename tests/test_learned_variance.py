"""A variance that is learned (Nichol & Dhariwal 2021): the bound against independent formulas, and what samples it."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import nn
from torch.distributions import Normal, kl_divergence

from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.data import Stream, load_images
from sdtune.diffusion.noise_schedule import noise_scheduler
from sdtune.diffusion.objective import DDPM, denoising_loss
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.diffusion.schedulers import make_scheduler
from sdtune.diffusion.variational_bound import LEARNED, SCALE, VariationalBound, hybrid_loss
from sdtune.run.rng import generator
from tests import contract
from tests.conftest import status

T = 20
KINDS = ("epsilon", "v_prediction")


def scheduler(kind="epsilon", variance=LEARNED):
    return DDPMScheduler(T, beta_end=0.3, prediction_type=kind, variance_type=variance, clip_sample=False)


def bound_of(kind="epsilon", levels=256):
    return VariationalBound(DDPM(scheduler(kind).alphas_cumprod, kind), levels)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(bars, t, x0, x_t):
    """The distribution of x_{t-1} given x_t and x_0: precisions of q(x_t | x_{t-1}) and of q(x_{t-1} | x_0) add up."""
    alpha, before = bars[t] / bars[t - 1], bars[t - 1]
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    mean = (alpha.sqrt() / (1 - alpha) * x_t + before.sqrt() / (1 - before) * x0) / precision
    return Normal(mean, precision**-0.5)


def variances(bars, t, v):
    """Standard deviation at ``v`` in [-1, 1] between the posterior's and sqrt(beta), which only t = 0 has not."""
    small, large = given(bars, max(t, 1), 0.0, torch.zeros(1).double()).scale, (1 - bars[t] / bars[t - 1]).sqrt()
    large = (1 - bars[0]).sqrt() if t == 0 else large
    return (torch.lerp(small.log(), large.log(), (v + 1) / 2)).exp()


def test_a_term_is_the_divergence_of_two_normal_distributions():
    bound = bound_of()
    bars = bound.objective.alphas_cumprod
    x0, estimate, noise, v = (numbers(1, 2, 3, 3, seed=k) for k in range(4))
    for t in (1, 7, T - 1):
        at = torch.tensor([t])
        x_t = bound.objective.noise(x0, noise, at)
        p = Normal(given(bars, t, estimate, x_t).mean, variances(bars, t, v))
        told = bound.term(x0, x_t, estimate, bound.log_variance(v, at), at)
        torch.testing.assert_close(told, kl_divergence(given(bars, t, x0, x_t), p).mean().reshape(1), rtol=1e-9, atol=0)
    last = Normal(bars[-1].sqrt() * x0, (1 - bars[-1]).sqrt())
    torch.testing.assert_close(bound.prior(x0), kl_divergence(last, Normal(0.0, 1.0)).mean().reshape(1).double())


def test_the_levels_share_the_normal_distribution():
    bound = bound_of(levels=17)
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64)
    for mean, deviation in ((0.03, 0.05), (-1.2, 0.4), (0.9, 0.01)):
        log_variance = torch.tensor(2 * math.log(deviation), dtype=torch.float64)
        told = bound.log_likelihood(levels, torch.tensor(mean, dtype=torch.float64), log_variance)
        normal = Normal(*torch.tensor([mean, deviation], dtype=torch.float64))
        edges = (levels[1:] + levels[:-1]) / 2
        below = torch.cat([torch.zeros(1).double(), normal.cdf(edges), torch.ones(1).double()])
        torch.testing.assert_close(told.exp(), below.diff().clamp(min=1e-12), rtol=1e-6, atol=1e-12)
        assert told.exp().sum() == pytest.approx(1, abs=1e-9)
    # In float32 as well the tails on both sides are alike
    far = bound.log_likelihood(torch.tensor([0.5, -0.5]), torch.zeros(2), torch.full((2,), 2 * math.log(0.08)))
    assert far[0].item() == far[1].item() == pytest.approx(math.log(math.erfc(0.4375 / 0.08 / 2**0.5) / 2), rel=1e-3)


def test_the_ends_of_the_range_are_the_fixed_variances():
    bound, sampler = bound_of(), scheduler()
    for t in range(1, T):
        for v, kind in ((-1.0, "fixed_small"), (1.0, "fixed_large"), (0.3, LEARNED)):
            said = torch.full((1, 1, 1, 1), v)
            theirs = sampler._get_variance(t, said, variance_type=kind)
            theirs = theirs if kind == LEARNED else theirs.log()
            assert bound.log_variance(said, torch.tensor([t])).item() == pytest.approx(theirs.item(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_trains_the_variance_alone(kind):
    bound, x0 = bound_of(kind), numbers(T, 1, 2, 2)
    batch = {"u": (torch.arange(T) + 0.5).double() / T, "noise": numbers(T, 1, 2, 2, seed=1)}
    pred, v = (numbers(T, 1, 2, 2, seed=k).requires_grad_() for k in (2, 3))
    loss = hybrid_loss(bound, lambda x_t, t: torch.cat([pred, v], 1), x0, batch)
    simple = denoising_loss(bound.objective, lambda x_t, t: pred, x0, batch)
    ours, theirs = (torch.autograd.grad(of.sum(), pred, retain_graph=True)[0] for of in (loss, simple))
    assert torch.equal(ours, theirs)
    assert (torch.autograd.grad(loss.sum(), v)[0].flatten(1).abs().sum(1) > 0).all()
    t = torch.arange(T)
    x_t = bound.objective.noise(x0, batch["noise"], t)
    terms = bound.term(x0, x_t, bound.objective.x0(x_t, pred, t), bound.log_variance(v, t), t)
    torch.testing.assert_close(loss.double(), simple.double() + SCALE * T * terms, rtol=1e-5, atol=1e-6)


# ---- sampling ------------------------------------------------------------------------------------------


class Said(nn.Module):
    """A network that says a share of x_t, and ``v`` of the variance if it is given; class 1 is the null class."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, v=None):
        super().__init__()
        self.v = v
        self.config = SimpleNamespace(
            in_channels=1, out_channels=1 if v is None else 2, sample_size=4, num_class_embeds=2
        )

    def forward(self, x_t, t, class_labels=None):
        pred = (0.5 + 0.2 * class_labels.reshape(-1, 1, 1, 1)) * x_t
        v = [] if self.v is None else [self.v * (1 - 2.0 * class_labels.reshape(-1, 1, 1, 1)).expand_as(x_t)]
        return SimpleNamespace(sample=torch.cat([pred, *v], 1))


class Pull:
    sees_x0 = False

    def __call__(self, x_t, t, x0, rows):
        return -3 * (x_t - 1).square().flatten(1).sum(1)


@pytest.mark.parametrize("how", [{}, {"guidance_scale": 2.0}, {"guides": [Pull()]}], ids=["plain", "classes", "guide"])
def test_a_variance_at_an_end_draws_as_the_fixed_one(how):
    """With classes too: the variance is that of the class, and not guided away from the null class."""
    drawn = {"steps": T, "labels": torch.tensor([0, 0]), **how}
    for v, kind in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        learned, fixed = (
            draw(network, scheduler(variance=of), [0, 1], **drawn)
            for network, of in ((Said(v), LEARNED), (Said(), kind))
        )
        torch.testing.assert_close(learned, fixed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "fixed_large"])
def test_other_samplers_and_variances_take_the_mean_alone(name):
    ancestral = name == "fixed_large"
    ours, theirs = (
        draw(
            network,
            scheduler(variance=name) if ancestral else make_scheduler(name, scheduler(variance=of)),
            [0],
            steps=T if ancestral else 5,
            labels=torch.tensor([0]),
        )
        for network, of in ((Said(0.5), LEARNED), (Said(), "fixed_small"))
    )
    assert ours.isfinite().all()
    assert torch.equal(ours, theirs)
    assert make_scheduler("ddpm", scheduler()).config.variance_type == LEARNED


@pytest.fixture(scope="module")
def learned(shared):
    return shared("ddpm", "--variance-type", LEARNED, "--num-train-timesteps", str(T), "--beta-end", "0.3")


def test_the_stock_pipeline_draws_the_same_picture(learned, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(learned)
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.out_channels) == (3, 6)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(generator=torch.Generator().manual_seed(3), num_inference_steps=T).images[0]
    assert status(["sample", "--model", str(learned), "--seed", "3", "--output-dir", str(tmp_path / "out")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "00000.png")), np.asarray(theirs))
    fixed = pipeline.scheduler
    fixed = DDPMScheduler.from_config(fixed.config, variance_type="fixed_large")
    assert not np.array_equal(np.asarray(to_images(draw(pipeline.unet, fixed, [3], steps=T))[0]), np.asarray(theirs))


def test_mistakes(learned, places, pixels, tmp_path, capsys):
    def told(recipe, *options):
        capsys.readouterr()
        assert status([*contract.command(recipe, places, tmp_path / "refused", *options), "--overwrite"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    bare = {"--model": str(learned), "--resolution": "16"}
    model = [word for pair in bare.items() for word in pair]
    assert "samples become alike" in told("ddpm", "--variance-type", LEARNED, "--prediction-type", "sample")
    assert "levels has no effect" in told("ddpm", "--levels", "17")
    for recipe in ("progressive", "consistency, distilled"):
        assert "learned its variance, which only sdtune ddpm" in told(recipe, *model)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"block_out_channels": [8], "in_channels": 3, "out_channels": 9}))
    words = ["ddpm", "--dataset", str(places.pictures), "--resolution", "16", "--output-dir", str(tmp_path / "x")]
    for options, line in (
        (["--model", str(learned), "--variance-type", "fixed_small"], "learned its variance, which only sdtune ddpm"),
        (["--model", str(pixels), "--variance-type", LEARNED], "has no channels for it"),
        (["--unet-config", str(learned / "unet" / "config.json")], "learned its variance, which only sdtune ddpm"),
        (["--unet-config", str(config)], "neither the channels of its input"),
    ):
        capsys.readouterr()
        assert status([*words, *options]) == 2
        assert line in capsys.readouterr().err


# ---- sdtune evaluate --bound ---------------------------------------------------------------------------


def test_evaluate_gives_the_bound_in_bits_a_dimension(learned, pictures, tmp_path, capsys):
    words = ["evaluate", str(learned), "--reference", str(pictures), "--bound", "--output-dir", str(tmp_path / "out")]
    held = ["--num-holdout-images", "2", "--resamples", "0"]
    assert status([*words, *held]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["images"] == 2
    ours = {name: figure["value"] for name, figure in found["figures"].items()}
    assert [*ours] == ["bound_fixed_small", "bound_fixed_large", "bound_learned"]
    assert ours == pytest.approx(by_hand(learned, pictures), rel=1e-3)
    for options, line in (
        (["--steps", "5"], "steps: bound draws no images"),
        (["--levels", "17"], "has pixels between them"),
    ):
        capsys.readouterr()
        assert status([*words, *options]) == 2
        assert line in capsys.readouterr().err
    words[1] = str(pictures)
    assert status(words) == 2
    assert f"SAMPLES {pictures}" in capsys.readouterr().err


def by_hand(run, folder):
    """The same from the pictures, by torch's distributions; the levels' edges are the Gaussian's on the last step."""
    unet, sampler = UNet2DModel.from_pretrained(run / "unet").eval(), DDPMPipeline.from_pretrained(run).scheduler
    bars, sums = sampler.alphas_cumprod.double(), dict.fromkeys(("bound_fixed_small", "bound_fixed_large"), 0.0)
    sums["bound_learned"] = 0.0
    cfg = DdpmConfig(dataset=str(folder), resolution=16, num_holdout_images=2)
    stream = Stream(cfg, load_images(cfg, captions=False), 1, "RGB")
    for k, sample in enumerate(stream.holdout):
        x0 = stream.pixels(sample)[None]
        noise = torch.randn((T, *x0.shape[1:]), generator=generator(0, "bound", k))
        last = Normal(bars[-1].sqrt() * x0, (1 - bars[-1]).sqrt())
        prior = kl_divergence(last, Normal(0.0, 1.0)).mean().item()
        for t in range(T):
            x_t = bars[t].sqrt() * x0 + (1 - bars[t]).sqrt() * noise[t]
            with torch.no_grad():
                pred, v = unet(x_t.float(), torch.tensor(t)).sample.chunk(2, 1)
            estimate = ((x_t - (1 - bars[t]).sqrt() * pred) / bars[t].sqrt()).clamp(-1, 1)
            for name, share in zip(sums, (-torch.ones_like(v), torch.ones_like(v), v), strict=True):
                scale = variances(bars, t, share.double())
                if t:
                    p = Normal(given(bars, t, estimate, x_t).mean, scale)
                    nats = kl_divergence(given(bars, t, x0, x_t), p).mean()
                else:
                    p, half = Normal(estimate.double(), scale), 1 / 255
                    above = torch.where(x0 > 1 - half, 1.0, p.cdf(x0 + half))
                    below = torch.where(x0 < -1 + half, 0.0, p.cdf(x0 - half))
                    nats = -(above - below).clamp(min=1e-12).log().mean()
                sums[name] += nats.item()
        sums = {name: nats + prior for name, nats in sums.items()}
    return {name: nats / math.log(2) / len(stream.holdout) for name, nats in sums.items()}


def test_zero_terminal_snr_goes_with_it():
    cfg = DdpmConfig(dataset="d", variance_type=LEARNED, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    bound = VariationalBound(DDPM(noise_scheduler(cfg).alphas_cumprod, "v_prediction"))
    x0, v, t = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([999])
    assert bound.term(x0, x0, x0 + 0.5, bound.log_variance(v, t), t).isfinite().all()
    assert bound.prior(x0).item() == pytest.approx(0)
