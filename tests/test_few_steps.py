"""The mathematics of distillation into few steps, against exact networks and against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline

from sdtune.diffusion.few_steps import (
    Consistency,
    dividing,
    follow,
    guidance_embedding,
    guidance_loss,
    path_end,
    progressive_loss,
    reflow_loss,
)
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.rectified_flow import RectifiedFlow, sampling_shift, shifted

SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}
KINDS = ["epsilon", "v_prediction", "sample"]


def objective(kind, huber_c=None):
    return DDPM(DDIMScheduler(**SCHEDULE).alphas_cumprod, kind, huber_c=huber_c)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_knows_the_image_has_nothing_to_learn(kind):
    process, x0 = objective(kind), torch.randn(6, 1, 4, 4, dtype=torch.float64)
    batch = {"u": torch.tensor([0, 0.1, 0.3, 0.6, 0.9, 0.999], dtype=torch.float64), "noise": torch.randn_like(x0)}

    def exact(x_t, t):
        a, s = process.scales(t, x_t)
        return process.target(x0, (x_t - a * x0) / s, t)

    assert progressive_loss(process, exact, exact, x0, batch, 4).abs().max() < 1e-10
    later = batch | {"u": batch["u"].clamp(min=0.1)}  # the first interval ends at timestep 0, which has some noise
    assert Consistency(process).loss(exact, exact, exact, x0, later, 50).abs().max() < 1e-10
    assert guidance_loss(process, exact, exact, x0, batch).abs().max() < 1e-10
    off = guidance_loss(process, lambda x_t, t: 1 + exact(x_t, t), exact, x0, batch)
    assert (off > 1e-12).all()
    wrong = progressive_loss(process, lambda x_t, t: 1 + exact(x_t, t), exact, x0, batch, 4)
    assert (wrong > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_was_told_the_target_ends_where_two_steps_of_the_teacher_do(kind):
    """The loss of a network that says so is zero, and its sample by stock DDIM is that of the teacher."""
    process, start = objective(kind), torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def teacher(x_t, t):
        a, s = process.scales(t, x_t)
        image = torch.tanh(x_t) * 0.7
        return process.target(image, (x_t - a * image) / s, t)

    def ddim(predict, count, x):
        scheduler = DDIMScheduler(**SCHEDULE, prediction_type=kind)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.set_timesteps(count)
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t.repeat(len(x))), t, x).prev_sample
        return x

    wanted = ddim(teacher, 2, start)
    a, s = process.scales(torch.tensor([999, 999]), start)

    def student(x_t, t):
        return process.target(wanted, (x_t - a * wanted) / s, t)

    assert (ddim(student, 1, start) - wanted).abs().max() < 1e-7
    noise = torch.randn_like(start)
    x0 = (start - s * noise) / a  # so that x_t is `start`
    batch = {"u": torch.zeros(2, dtype=torch.float64), "noise": noise}
    # x0 is some 1e4 here, as almost all of the last timestep is noise
    assert progressive_loss(process, student, teacher, x0, batch, 1).abs().max() < 1e-7


@pytest.mark.parametrize("steps", [4, 8, 20, 50, 1000])
def test_the_grid_is_that_of_trailing_timesteps_and_of_lcm(steps):
    grid, here = objective("epsilon").grid, torch.device("cpu")
    for scheduler in (DDIMScheduler(**SCHEDULE), LCMScheduler(original_inference_steps=steps)):
        scheduler.set_timesteps(steps)
        assert torch.equal(grid(steps, here).flip(0)[:-1], scheduler.timesteps)
    assert torch.equal(grid(2 * 4, here)[::2], grid(4, here))


def test_counts_that_divide_are_named():
    assert dividing(1000, 16) == [5, 8, 10, 20, 25, 40]
    assert dividing(1000, 999) == [200, 250, 500, 1000]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_ddim(kind):
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=kind)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(4)
    process, x, pred = objective(kind), *torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    for t in scheduler.timesteps:
        there = scheduler.step(pred, t, x).prev_sample
        assert torch.allclose(there, process.step(x, pred, t[None], t[None] - 250), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_consistency_function_is_that_of_the_sampler(kind):
    scheduler = LCMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind, timestep_scaling=3.0)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(4)
    consistent = Consistency(objective(kind), scaling=3.0)
    x, pred = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    for t in scheduler.timesteps:
        theirs = scheduler.step(pred, t, x).denoised
        assert torch.allclose(theirs, consistent(lambda *_: pred, x, t[None]), rtol=1e-6, atol=1e-6)
    assert torch.equal(consistent(lambda *_: pred, x, torch.tensor([0])), x)  # the boundary


def test_guidance_is_embedded_as_pipelines_do():
    w = torch.tensor([0.5, 2.0])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 256)
    assert torch.equal(guidance_embedding(w, 256), theirs)


def test_a_target_follows():
    live, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = target.weight.detach().clone()
    follow(target, live, 0.75)
    assert torch.allclose(target.weight, 0.75 * before + 0.25 * live.weight)
    follow(target, live, 0.0)
    assert torch.equal(target.weight, live.weight) and torch.equal(target.bias, live.bias)


EVEN = torch.linspace(1, 0, 7, dtype=torch.float64)


def bent(x, t):
    """The velocity of a flow whose paths are not straight."""
    return torch.sin(3 * x) + t.view(-1, 1, 1, 1) * x


@pytest.mark.parametrize("options", [{"shift": 1.0}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_a_path_is_that_of_the_sampler(options):
    scheduler, noise = FlowMatchEulerDiscreteScheduler(**options), torch.randn(2, 4, 16, 16, dtype=torch.float64)
    shift = sampling_shift(scheduler, 2)
    times = shifted(EVEN, shift, noise)
    mu = {"mu": math.log(shift.at(noise))} if options.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(sigmas=EVEN[:-1].tolist(), **mu)
    assert torch.allclose(times.float(), scheduler.sigmas, atol=1e-6)
    scheduler.sigmas = times
    x = noise.float()
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(bent(x, times[k].float().expand(2)), t, x).prev_sample
    assert (path_end(bent, noise, times) - x).abs().max() < 1e-5


def test_a_flow_whose_paths_are_straight_has_nothing_to_learn():
    """And one step of a student that knows where each path of a bent one ends goes there."""
    image, noise = torch.randn(2, 5, 4, 4, 4, dtype=torch.float64)
    batch = {"noise": noise, "u": torch.tensor([0, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)}
    flow = RectifiedFlow()

    def straight(x_t, t):
        return noise - image

    assert reflow_loss(flow, straight, straight, batch, EVEN).abs().max() < 1e-12
    assert (reflow_loss(flow, lambda *_: noise - image + 1, straight, batch, EVEN) - 1).abs().max() < 1e-6
    end = path_end(bent, noise, EVEN)
    assert reflow_loss(flow, lambda *_: noise - end, bent, batch, EVEN).abs().max() < 1e-12
    for steps in (1, 2):
        ended = path_end(lambda *_: noise - end, noise, torch.linspace(1, 0, steps + 1))
        assert (ended - end).abs().max() < 1e-12
    assert (reflow_loss(flow, bent, bent, batch, EVEN) > 1e-3).all()
