"""Continuous noise levels ``x = x_0 + sigma noise`` and the consistency functions on them (Song et al. 2023).

    f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, 250 ln sigma)        f(x, sigma_min) = x

F is the network; the scalings are those of appendix C, and of diffusers' CMStochasticIterativeScheduler.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdtune.diffusion.objective import DDPM, per_image

Network = Callable[[Tensor, Tensor], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(x, sigma)`` to an estimate of the image, like ``x``; sigma is ``[B]``."""


class Levels(NamedTuple):
    """Where the noise levels lie (Karras et al. 2022, equation 5), and the standard deviation of the images."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def rising(self, count: int) -> Tensor:
        """``count`` levels from the least to the highest: float64 ``[count]``."""
        ends = [sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max)]
        return torch.linspace(*ends, count, dtype=torch.float64) ** self.rho

    def consistent(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        """The consistency function of a network at ``x`` ``[B, C, H, W]``, ``sigma`` ``[B]``."""
        s, data = per_image(sigma, x), self.sigma_data
        c_skip = data**2 / ((s - self.sigma_min) ** 2 + data**2)
        c_out = (s - self.sigma_min) * data / (s**2 + data**2).sqrt()
        scaled = x / (s**2 + data**2).sqrt()
        return c_skip * x + c_out * network(scaled, 250 * sigma.log()).to(x)


def doubling(step: int, phase: int, s_0: int, s_1: int) -> int:
    """Intervals N(k) of improved consistency training (Song & Dhariwal 2023, section 3.4): doubled in each phase."""
    return int(min(s_0 * 2 ** min(step // phase, 64), s_1))


def square_root(step: int, total: int, s_0: int, s_1: int) -> int:
    """Intervals N(k) of consistency training (Song et al. 2023, appendix C)."""
    grown = min(step / total, 1.0) * ((s_1 + 1) ** 2 - s_0**2) + s_0**2
    return min(math.ceil(math.sqrt(grown) - 1) or 1, s_1)


GROWTH = {"doubling": doubling, "square_root": square_root}
"""How the number of intervals grows, by the name of ``--discretization``."""


def lognormal_interval(u: Tensor, levels: Tensor, mean: float, std: float) -> Tensor:
    """The interval at quantile ``u`` in [0, 1) if ln sigma is normal: int64 ``[B]`` below ``len(levels) - 1``.

    Song & Dhariwal 2023, section 3.5.
    """
    edges = torch.special.erf((levels.log() - mean) / (math.sqrt(2) * std))
    odds = (edges[1:] - edges[:-1]).cumsum(0)
    return torch.searchsorted(odds / odds[-1], u.to(odds), right=True).clamp(max=len(odds) - 1)


def denoiser(objective: DDPM, predict: Network) -> Denoise:
    """What a DDPM's network says of images at any noise level, between timesteps too.

    Its ``x_t`` is ``x / sqrt(1 + sigma^2)``. Levels beyond the schedule are told as its first or last timestep.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        logs = objective.log_sigma.on(sigma.device)
        places = sigma.to(logs).log()
        after = torch.searchsorted(logs, places).clamp(1, len(logs) - 1)
        share = (places - logs[after - 1]) / (logs[after] - logs[after - 1])
        t = (after - 1 + share.clamp(0, 1)).to(x)
        s = per_image(sigma, x).to(x)
        a = 1 / (1 + s**2).sqrt()
        pred = predict(a * x, t).to(x)
        match objective.prediction:
            case "epsilon":
                return x - s * pred
            case "v_prediction":
                return a * (a * x) - s * a * pred
            case "sample":
                return pred

    return denoise


def solve(denoise: Denoise, x: Tensor, sigma: Tensor, to: Tensor, heun: bool) -> Tensor:
    """``x`` at the level ``to`` ``[B]`` on the path through ``x`` at ``sigma``: a step of Euler, or of Heun.

    Karras et al. 2022, algorithm 1.
    """
    s, s_to = per_image(sigma, x).to(x), per_image(to, x).to(x)
    slope = (x - denoise(x, sigma)) / s
    there = x + (s_to - s) * slope
    if heun:
        slope_there = (there - denoise(there, to)) / s_to
        there = x + (s_to - s) * (slope + slope_there) / 2
    return there


def pseudo_huber(one: Tensor, other: Tensor, c: float) -> Tensor:
    """``sqrt(|one - other|^2 + c^2) - c`` over an image, in float32: ``[B]`` (Song & Dhariwal 2023, section 3.3)."""
    return ((one - other).float().square().flatten(1).sum(1) + c**2).sqrt() - c
