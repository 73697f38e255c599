"""Consistency functions on continuous noise against diffusers' scheduler, a closed form, and the papers' schedules."""

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler

from sdtune.diffusion.noise_levels import (
    Levels,
    denoiser,
    doubling,
    lognormal_interval,
    pseudo_huber,
    solve,
    square_root,
)
from sdtune.diffusion.objective import DDPM

LEVELS = Levels()


def test_the_consistency_function_is_that_of_the_scheduler():
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=9, clip_denoised=False)
    scheduler.set_timesteps(9)
    x, pred = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double()[:-1], strict=True):
        told = []
        ours = LEVELS.consistent(lambda x, t, told=told: told.extend((x, t)) or pred, x, sigma[None])
        assert torch.allclose(told[0], scheduler.scale_model_input(x, t), rtol=1e-6)
        assert told[1].item() == pytest.approx(t.item(), abs=1e-3)
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
        scheduler._step_index += 1
        assert torch.allclose(ours, c_out * pred + c_skip * x, rtol=1e-7)
    assert torch.allclose(LEVELS.rising(9).flip(0), scheduler.sigmas.double()[:-1], rtol=1e-6)
    assert torch.equal(LEVELS.consistent(lambda x, t: pred, x, torch.tensor([0.002], dtype=torch.float64)), x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_teacher_says_the_image_between_timesteps_too(kind):
    """A network that knows its image says it at every noise level; the path to a lower one is then straight."""
    objective = DDPM(DDPMScheduler().alphas_cumprod, kind)
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    sigma, to = torch.tensor([0.05, 1.7, 60.0], dtype=torch.float64), torch.tensor([0.02, 1.0, 3.0]).double()
    alphas = 1 / (1 + sigma**2)

    def network(x_t, t):
        known = objective.alphas_cumprod.log()  # it interpolates likewise
        assert ((t >= 0) & (t <= len(known) - 1)).all()
        a = (x_t * 0 + 1) * alphas.sqrt().reshape(-1, 1, 1, 1)
        s = (1 - a**2).sqrt()
        eps = (x_t - a * x0) / s
        return {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[kind]

    x = x0 + sigma.reshape(-1, 1, 1, 1) * noise
    assert torch.allclose(denoiser(objective, network)(x, sigma), x0, atol=1e-9)
    straight = x0 + to.reshape(-1, 1, 1, 1) * noise
    for heun in (False, True):
        assert torch.allclose(solve(lambda x, sigma: x0, x, sigma, to, heun), straight, atol=1e-9)


def test_heun_is_of_second_order():
    """Of images that are normal with variance 1, x at sigma is sqrt(1 + sigma^2) times what it is at 0."""
    x, ends = torch.ones(1, 1, 1, 1, dtype=torch.float64), (2.0, 1.9)
    sigma, to = (torch.tensor([end], dtype=torch.float64) for end in ends)
    exact = ((1 + ends[1] ** 2) / (1 + ends[0] ** 2)) ** 0.5
    errors = [abs(solve(lambda x, s: x / (1 + s**2), x, sigma, to, heun).item() - exact) for heun in (False, True)]
    assert errors[0] > 1e-4 > 1e-5 > errors[1]


def test_the_number_of_levels_grows_as_the_papers_say():
    assert [doubling(k, 100, 10, 1280) for k in (0, 99, 100, 700, 799, 5000)] == [10, 10, 20, 1280, 1280, 1280]
    grown = [square_root(k, 1000, 2, 150) for k in (0, 1, 500, 1000, 2000)]
    assert grown[0] in (1, 2) and grown[-1] == grown[-2] == 150 and grown == sorted(grown)


def test_intervals_are_drawn_as_the_normal_density_says():
    levels = LEVELS.rising(11)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = torch.bincount(lognormal_interval(u, levels, -1.1, 2.0), minlength=10) / 4000
    edges = torch.distributions.Normal(-1.1, 2.0).cdf(levels.float().log())
    odds = edges[1:] - edges[:-1]
    assert torch.allclose(counts, (odds / odds.sum()).float(), atol=1e-3)


def test_pseudo_huber_is_over_whole_images():
    one = torch.zeros(2, 1, 2, 2)
    assert torch.allclose(
        pseudo_huber(one, one + torch.tensor([0.0, 3.0])[:, None, None, None], 1.0), torch.tensor([0, 37**0.5 - 1])
    )
