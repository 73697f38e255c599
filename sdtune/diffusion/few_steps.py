"""Distillation into few steps: losses on an objective, and on networks as functions ``(x_t, t) -> pred``.

A consistency function says from every point of a path where the path began (Song et al. 2023). On the timesteps of DDPM
it is ``f(x, t) = c_skip(t) x + c_out(t) x0(x, t)`` (equation 5), with the scalings of latent consistency models
(Luo et al. 2023, section 4.1), which are those of diffusers' LCMScheduler.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sdtune.diffusion.moving_average import move_average
from sdtune.diffusion.objective import DDPM, per_image
from sdtune.diffusion.rectified_flow import RectifiedFlow
from sdtune.diffusion.tables import widest_float

Predict = Callable[[Tensor, Tensor], Tensor]
SIGMA_DATA = 0.5


def dividing(timesteps: int, count: int) -> list[int]:
    """The numbers of steps that divide ``timesteps``, those nearest to ``count``: at most three below, three above."""
    fitting = [n for n in range(1, timesteps + 1) if timesteps % n == 0]
    return [n for n in fitting if n < count][-3:] + [n for n in fitting if n > count][:3]


class Consistency:
    """The consistency function of a network on DDPM's timesteps; at timestep 0 it is the identity.

    Args:
        scaling: by what timesteps are multiplied in the scalings: more leaves the boundary sooner.
    """

    def __init__(self, objective: DDPM, scaling: float = 10.0):
        self.objective, self.scaling = objective, scaling

    def __call__(self, predict: Predict, x_t: Tensor, t: Tensor) -> Tensor:
        """Where the path through ``x_t`` began: like ``x_t``."""
        scaled = per_image(t.to(widest_float(t.device)) * self.scaling, x_t)
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return c_skip.to(x_t) * x_t + c_out.to(x_t) * self.objective.x0(x_t, predict(x_t, t).to(x_t), t)

    def loss(
        self, student: Predict, target: Predict, teacher: Predict, x0: Tensor, batch: Mapping[str, Any], count: int
    ) -> Tensor:
        """Consistency distillation (Song et al. 2023, algorithm 2) over one DDIM step of the teacher: ``[B]``.

        Args:
            count: steps of the teacher; ``u`` of the batch chooses one of them.
        """
        objective, n = self.objective, (batch["u"] * count).long()
        times = objective.grid(count, x0.device)
        t, to = times[n + 1], times[n].clamp(min=0)
        x_t = objective.noise(x0, batch["noise"], t)
        with torch.no_grad():
            x_to = objective.step(x_t, teacher(x_t, t).to(x_t), t, to)
            wanted = self(target, x_to, to)
        return objective.distance(self(student, x_t, t), wanted)


def guidance_loss(objective: DDPM, student: Predict, guided: Predict, x0: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """What a student is off the image that a guided teacher predicts (Meng et al. 2023, algorithm 1): ``[B]``.

    All timesteps are drawn alike; the error has the weight max(SNR, 1).
    """
    t = objective.timesteps(batch["u"])
    x_t = objective.noise(x0, batch["noise"], t)
    with torch.no_grad():
        wanted = objective.x0(x_t, guided(x_t, t).to(x_t), t)
        a, s = objective.scales(t, x_t)
    weight = (a / s).square().flatten().clamp(min=1)
    return weight * objective.distance(objective.x0(x_t, student(x_t, t).to(x_t), t), wanted)


def progressive_loss(
    objective: DDPM, student: Predict, teacher: Predict, x0: Tensor, batch: Mapping[str, Any], count: int
) -> Tensor:
    """Progressive distillation (Salimans & Ho 2022, algorithm 2) of 2 x ``count`` steps into ``count``: ``[B]``.

    The target is the image for which one step of the student ends where two of the teacher do. Its error has the weight
    max(SNR, 1), which the paper calls truncated SNR.
    """
    times = objective.grid(2 * count, x0.device)
    n = (batch["u"] * count).long()
    t, between, to = times[2 * n + 2], times[2 * n + 1], times[2 * n]
    x_t = objective.noise(x0, batch["noise"], t)
    with torch.no_grad():
        x_between = objective.step(x_t, teacher(x_t, t).to(x_t), t, between)
        x_to = objective.step(x_between, teacher(x_between, between).to(x_t), between, to)
        (a_t, s_t), (a_to, s_to) = objective.scales(t, x_t), objective.scales_or_clean(to, x_t)
        wanted = (x_to - s_to / s_t * x_t) / (a_to - s_to / s_t * a_t)
        weight = (a_t / s_t).square().flatten().clamp(min=1)
    return weight * objective.distance(objective.x0(x_t, student(x_t, t).to(x_t), t), wanted)


def path_end(velocity: Predict, noise: Tensor, times: Tensor) -> Tensor:
    """Where a flow carries ``noise``, by Euler's method: like ``noise``.

    Args:
        velocity: towards the noise.
        times: those of the steps, from 1, the noise, to 0, the image: ``[steps + 1]``.
    """
    x = noise
    for t, to in pairwise(times.to(noise)):
        x = x + (to - t) * velocity(x, t.expand(len(x))).to(x)
    return x


def reflow_loss(
    objective: RectifiedFlow, student: Predict, teacher: Predict, batch: Mapping[str, Any], times: Tensor
) -> Tensor:
    """Reflow (Liu et al. 2022, algorithm 1): the ends of the teacher's paths, joined by straight ones: ``[B]``.

    Args:
        times: those of the teacher's steps, from 1 to 0.
    """
    noise, t = batch["noise"], batch["u"].to(batch["noise"])
    with torch.no_grad():
        image = path_end(teacher, noise, times)
    x_t = objective.noise(image, noise, t)
    return objective.distance(student(x_t, t), objective.target(image, noise, t))


@contextmanager
def same_dropout(like: Tensor) -> Iterator[None]:
    """Context after which the random numbers of ``like``'s device begin again: what follows drops out the same."""
    with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
        yield


def follow(target: nn.Module, live: nn.Module, decay: float) -> None:
    """Move a network towards the live one: ``decay target + (1 - decay) live``; at 0 it is a copy."""
    move_average(target.parameters(), live.parameters(), decay)


def guidance_embedding(w: Tensor, size: int) -> Tensor:
    """Sinusoids of guidance ``w`` ``[B]``, as pipelines give them to networks with a ``time_cond_proj_dim``.

    ``w`` is the paper's, one less than the ``guidance_scale`` of a pipeline.
    """
    half = size // 2
    rates = torch.exp(torch.arange(half, device=w.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * w.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
