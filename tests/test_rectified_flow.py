"""Rectified flow: its densities, shifts and weights are those of diffusers, and its parts fit together."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from sdtune.diffusion.rectified_flow import RectifiedFlow, ResolutionShift

QUANTILES = torch.tensor([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
X0 = torch.zeros(1, 4, 8, 8)


@pytest.mark.parametrize(
    ("density", "options"),
    [
        ("uniform", {}),
        ("logit_normal", {"mean": 0.0, "std": 1.0}),
        ("logit_normal", {"mean": 0.8, "std": 0.5}),
        ("mode", {"mode_scale": 1.29}),
        ("mode", {"mode_scale": 0.5}),
    ],
)
def test_densities_are_those_of_diffusers(density, options):
    generator = torch.Generator().manual_seed(0)
    given = {
        "logit_mean": options.get("mean"),
        "logit_std": options.get("std"),
        "mode_scale": options.get("mode_scale"),
    }
    drawn = compute_density_for_timestep_sampling(density, 400_000, **given, generator=generator)
    ours = RectifiedFlow(density, **options).timesteps(QUANTILES.double(), X0)
    assert (ours - drawn.sort().values[(QUANTILES * 400_000).long()]).abs().max() < 0.005


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_later_quantiles_are_noisier_times_inside_the_unit_interval(density, shift):
    t = RectifiedFlow(density, shift).timesteps(torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1], X0)
    assert ((t >= 0) & (t <= 1)).all()
    assert (t.diff() > 0).all()


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(weighting):
    t = torch.linspace(0.01, 0.99, 50)
    assert torch.allclose(RectifiedFlow(weighting=weighting).weight(t), compute_loss_weighting_for_sd3(weighting, t))


def test_a_fixed_shift_is_that_of_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = RectifiedFlow(shift=3.0).timesteps(torch.arange(1000, 0, -1).double() / 1000, X0)
    assert torch.allclose(t, scheduler.sigmas[:1000], atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_by_resolution_is_that_of_the_scheduler(kind):
    config = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **config)
    objective = RectifiedFlow(shift=ResolutionShift.of(scheduler.config, patch=2))
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for side in (32, 128):
        tokens = (side // 2) ** 2
        mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
        t = objective.timesteps(u, torch.zeros(1, 16, side, side))
        assert torch.allclose(t, scheduler.time_shift(mu, 1.0, u).float(), atol=1e-6)


def test_a_velocity_stands_for_the_image_and_the_noise_it_was_made_of():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    objective, t = RectifiedFlow(), torch.tensor([0.1, 0.5, 0.9])
    x_t, velocity = objective.noise(x0, noise, t), objective.target(x0, noise, t)
    assert torch.allclose(objective.x0(x_t, velocity, t), x0, atol=1e-5)
    assert torch.allclose(objective.epsilon(x_t, velocity, t), noise, atol=1e-5)
    assert torch.equal(objective.distance(velocity, velocity), torch.zeros(3))


def test_the_ends_of_the_density_are_finite():
    for density in ("uniform", "logit_normal", "mode"):
        assert (
            RectifiedFlow(density).timesteps(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), X0).isfinite().all()
        )
    assert math.isclose(
        RectifiedFlow("logit_normal", mean=1.0).timesteps(torch.tensor([0.5]), X0).item(), 0.7310586, rel_tol=1e-6
    )
