"""The mathematics of Ho et al. 2020 in float64: what is trained and what is saved to sample with, against closed forms.

Nothing here uses the formulas of the paper where the definition will do: forward moments come from running the Markov
chain, the posterior from conditioning a joint Gaussian, divergences from the moments of both sides.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.diffusion.noise_schedule import noise_scheduler
from sdtune.diffusion.objective import DDPM, denoising_loss

T = 60
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
KINDS = ("epsilon", "v_prediction", "sample")
SOME = (1, 2, 7, 30, 58, 59)


def betas(name):
    """In float64, from the definitions (Ho et al. 2020; Rombach et al. 2022; Nichol & Dhariwal 2021, equation 17)."""
    first, last = 1e-3, 0.2
    match name:
        case "linear":
            return np.array([first + (last - first) * t / (T - 1) for t in range(T)])
        case "scaled_linear":
            return np.array([(first**0.5 + (last**0.5 - first**0.5) * t / (T - 1)) ** 2 for t in range(T)])
        case _:
            f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
            return np.array([min(1 - f[t + 1] / f[t], 0.999) for t in range(T)])


def chain(name):
    """Mean and variance of x_t given x_0 = 1, from the Markov chain x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z."""
    mean, variance, found = 1.0, 0.0, []
    for beta in betas(name):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        found.append((mean, variance))
    return found


def scheduler(name="linear", **fields):
    """The scheduler that a run saves; estimates of x_0 are left as they are, where sampling would clip them."""
    cfg = DdpmConfig(dataset="d", num_train_timesteps=T, beta_schedule=name, beta_start=1e-3, beta_end=0.2, **fields)
    return DDPMScheduler.from_config(noise_scheduler(cfg).config, clip_sample=False)


def posterior(name, t, x0, x_t):
    """Mean and variance of x_{t-1} given x_t and x_0, by conditioning the joint Gaussian of (x_{t-1}, x_t)."""
    (m, v), beta = chain(name)[t - 1], betas(name)[t]
    a = math.sqrt(1 - beta)
    joint = np.array([[v, a * v], [a * v, a * a * v + beta]])
    gain = joint[0, 1] / joint[1, 1]
    return m * x0 + gain * (x_t - a * m * x0), joint[0, 0] - gain * joint[1, 0]


def kl(mean_p, var_p, mean_q, var_q):
    """KL(p || q) of two Gaussians in one dimension, by integrating it."""
    x = np.linspace(mean_p - 12 * math.sqrt(var_p), mean_p + 12 * math.sqrt(var_p), 200_001)
    log_p = -((x - mean_p) ** 2) / (2 * var_p) - 0.5 * math.log(2 * math.pi * var_p)
    log_q = -((x - mean_q) ** 2) / (2 * var_q) - 0.5 * math.log(2 * math.pi * var_q)
    return float(np.trapezoid(np.exp(log_p) * (log_p - log_q), x))


def stepped(sampler, t, x_t, pred):
    """Mean and standard deviation of the sampler's step from x_t, found from two draws of known noise."""
    x_t, pred = torch.tensor([[[[x_t]]]], dtype=torch.float64), torch.tensor([[[[pred]]]], dtype=torch.float64)
    drawn = [
        (
            torch.randn((1, 1, 1, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item(),
            sampler.step(pred, t, x_t, generator=torch.Generator().manual_seed(seed)).prev_sample.item(),
        )
        for seed in (0, 1)
    ]
    (z, x), (other_z, other_x) = drawn
    std = (x - other_x) / (z - other_z)
    return x - std * z, std


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_moments(name):
    objective = DDPM(scheduler(name).alphas_cumprod)
    like = torch.ones(T, 1, dtype=torch.float64)
    a, s = (scale.flatten() for scale in objective.scales(torch.arange(T), like))
    mean, variance = (torch.tensor(moment, dtype=torch.float64) for moment in zip(*chain(name), strict=True))
    torch.testing.assert_close(a, mean, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(s**2, variance, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_of_the_saved_scheduler_is_the_posterior(name, kind):
    """Given what the network should say, the sampler's mean is the posterior's, and its variance beta-tilde or beta."""
    small, large = (scheduler(name, prediction_type=kind, variance_type=v) for v in ("fixed_small", "fixed_large"))
    objective = DDPM(small.alphas_cumprod, kind)
    x0, noise = 0.3, -0.7
    for t in SOME:
        at, one = torch.tensor([t]), torch.ones(1, dtype=torch.float64)
        x_t, pred = (
            objective.noise(x0 * one, noise * one, at).item(),
            objective.target(x0 * one, noise * one, at).item(),
        )
        mean, variance = posterior(name, t, x0, x_t)
        for sampler, expected in ((small, variance), (large, betas(name)[t])):
            found, std = stepped(sampler, t, x_t, pred)
            assert found == pytest.approx(mean, abs=3e-5)
            assert std**2 == pytest.approx(expected, rel=2e-3)


def test_the_last_step_adds_no_noise():
    sampler = scheduler()
    x_t, pred = torch.full((1, 1, 1, 1), 0.2), torch.full((1, 1, 1, 1), 0.1)
    ends = [sampler.step(pred, 0, x_t, generator=torch.Generator().manual_seed(s)).prev_sample for s in (0, 1)]
    assert torch.equal(*ends)


def test_prior_term():
    """L_T: the divergence of x_T given x_0 from N(0, 1)."""
    objective = DDPM(scheduler().alphas_cumprod)
    for x0 in (-1.0, 0.4):
        a, s = (v.item() for v in objective.scales(torch.tensor([T - 1]), torch.ones(1, dtype=torch.float64)))
        closed = 0.5 * (a * a * x0 * x0 + s * s - 1 - math.log(s * s))
        mean, variance = chain("linear")[-1]
        assert closed == pytest.approx(kl(mean * x0, variance, 0, 1), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_simple_loss_is_a_reweighting_of_the_bound(variance_type):
    """L_{t-1} = KL(posterior || sampler) = weight_t * simple loss + what no network changes (equation 12)."""
    sampler = scheduler(variance_type=variance_type)
    objective = DDPM(sampler.alphas_cumprod)
    x0, noise = torch.full((1, 1, 1, 1), 0.3).double(), torch.full((1, 1, 1, 1), -0.7).double()
    for t in SOME:
        beta, alpha = betas("linear")[t], 1 - betas("linear")[t]
        abar = chain("linear")[t][0] ** 2
        u = torch.tensor([(t + 0.5) / T], dtype=torch.float64)
        x_t = objective.noise(x0, noise, torch.tensor([t])).item()
        mean, variance = posterior("linear", t, 0.3, x_t)
        for wrong in (0.0, 0.25, -0.6):
            batch = {"u": u, "noise": noise}
            simple = denoising_loss(objective, lambda x, t, wrong=wrong: noise + wrong, x0, batch).item()
            found, std = stepped(sampler, t, x_t, noise.item() + wrong)
            fixed = 0.5 * (variance / std**2 - 1 - math.log(variance / std**2))
            weight = beta**2 / (2 * std**2 * alpha * (1 - abar))
            assert kl(mean, variance, found, std**2) == pytest.approx(weight * simple + fixed, rel=5e-3, abs=1e-6)


def test_reconstruction_term():
    """L_0: at t = 0 the sampler's mean is the estimate of x_0; its error is the simple loss by (1 - abar) / abar."""
    sampler = scheduler()
    objective = DDPM(sampler.alphas_cumprod)
    x0, noise, t = torch.full((1, 1, 1, 1), 0.3).double(), torch.full((1, 1, 1, 1), -0.7).double(), torch.tensor([0])
    x_t = objective.noise(x0, noise, t)
    batch = {"u": torch.zeros(1, dtype=torch.float64), "noise": noise}
    simple = denoising_loss(objective, lambda x, t: noise + 0.4, x0, batch).item()
    end = sampler.step(noise + 0.4, 0, x_t).prev_sample
    abar = 1 - betas("linear")[0]
    assert (end - x0).square().item() == pytest.approx((1 - abar) / abar * simple, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_prediction_the_loss_is_the_simple_loss_reweighted(kind):
    """An error of the noise by d is one of the velocity by d / a, and of x_0 by s/a d, which its weight takes back."""
    objective, simple = DDPM(scheduler().alphas_cumprod, kind), DDPM(scheduler().alphas_cumprod)
    x0, noise = (torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1))
    batch, d = {"u": (torch.tensor(SOME) + 0.5).double() / T, "noise": noise}, 0.2
    x_t = simple.noise(x0, noise, torch.tensor(SOME))
    estimate = simple.x0(x_t, noise + d, torch.tensor(SOME))
    told = objective.target(estimate, noise + d, torch.tensor(SOME))
    loss = denoising_loss(objective, lambda x, t: told, x0, batch).double()
    a = torch.tensor([chain("linear")[t][0] for t in SOME], dtype=torch.float64)
    factor = {"epsilon": torch.ones(6).double(), "sample": torch.ones(6).double(), "v_prediction": 1 / a**2}[kind]
    torch.testing.assert_close(loss, d**2 * factor, rtol=1e-3, atol=1e-7)
