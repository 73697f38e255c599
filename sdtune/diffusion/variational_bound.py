"""The variational bound of a DDPM on pixels (Ho et al. 2020, equation 5), with a fixed or a learned variance.

    L_vlb = L_T + sum_t L_t + L_0
    L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))        L_0 = -log p(x_0 | x_1)

A learned variance lies between beta-tilde and beta on a logarithmic scale (Nichol & Dhariwal 2021, equation 15):
log Sigma = v log beta + (1 - v) log beta-tilde. The network gives 2 v - 1 in a second half of its channels, as
``learned_range`` of diffusers reads it.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sdtune.diffusion.objective import DDPM, denoising_loss, per_image
from sdtune.diffusion.tables import Table

LEARNED = "learned_range"
"""The ``variance_type`` of a scheduler whose model learned its variance."""
SCALE = 1e-3
"""Weight of the bound in the hybrid loss: lambda of Nichol & Dhariwal 2021, section 3.1."""


def between(v: Tensor, log_small: Tensor | float, log_large: Tensor | float) -> Tensor:
    """log Sigma at ``v``: -1 is the first end, 1 the second (Nichol & Dhariwal 2021, equation 15)."""
    share = (v + 1) / 2
    return share * log_large + (1 - share) * log_small


class VariationalBound:
    """The terms of the bound in nats a dimension, the mean over the values of each image: ``[B]``.

    Args:
        objective: the forward process, and what the network predicts.
        levels: values that a pixel can have, evenly spaced from -1 to 1: 256 of a file in 8 bits, 17 of ``digits``.
    """

    def __init__(self, objective: DDPM, levels: int = 256):
        self.objective, self.levels = objective, levels
        bars = objective.alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
        beta = 1 - bars / before
        tilde = (1 - before) / (1 - bars) * beta
        tilde[0] = tilde[min(1, len(tilde) - 1)]  # that of the clean image is 0, whose logarithm no variance reaches
        self.log_large, self.log_small = Table(beta.clamp(min=1e-20).log()), Table(tilde.clamp(min=1e-20).log())
        self.of_x0 = Table(before.sqrt() * beta / (1 - bars))
        self.of_x_t = Table((1 - beta).sqrt() * (1 - before) / (1 - bars))

    def log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """log Sigma of what the network says, 2 v - 1 ``[B, C, H, W]``. At 1 it is fixed large, at -1 fixed small."""
        return between(v, *(per_image(table.at(t, v.dtype), v) for table in (self.log_small, self.log_large)))

    def term(self, x0: Tensor, x_t: Tensor, estimate: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
        """L_t of each image, and L_0 at t = 0. The means of q and p differ only in x_0 and the ``estimate`` of it."""
        of_x0, of_x_t, log_q = (
            per_image(table.at(t, x0.dtype), x0) for table in (self.of_x0, self.of_x_t, self.log_small)
        )
        squared = (of_x0 * (x0 - estimate)).square()
        kl = 0.5 * (log_variance - log_q + (log_q - log_variance).exp() - 1 + squared * (-log_variance).exp())
        nll = -self.log_likelihood(x0, of_x0 * estimate + of_x_t * x_t, log_variance)
        return torch.where(per_image(t == 0, x0), nll, kl).flatten(1).mean(1)

    def log_likelihood(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Log-probability of the level of each value: the Gaussian's share between the levels beside it.

        The outer levels reach to infinity (Ho et al. 2020, equation 13).
        """
        half, precision = 1 / (self.levels - 1), (-0.5 * log_variance).exp() / math.sqrt(2)
        low = torch.where(x0 < -1 + half, -math.inf, (x0 - half - mean) * precision)
        high = torch.where(x0 > 1 - half, math.inf, (x0 + half - mean) * precision)
        # A tail above the mean would be lost beside 1: below the mean the same tail is exact
        low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
        return (0.5 * (torch.erfc(-high) - torch.erfc(-low))).clamp(min=1e-12).log()

    def prior(self, x0: Tensor) -> Tensor:
        """L_T: the divergence of the last x_t from pure noise."""
        bar = float(self.objective.alphas_cumprod[-1])
        return 0.5 * (bar * x0.square() - bar - math.log1p(-bar)).flatten(1).mean(1)


def hybrid_loss(
    bound: VariationalBound, predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, batch: Mapping[str, Tensor]
) -> Tensor:
    """``L_simple + lambda L_vlb`` of each image (Nichol & Dhariwal 2021, equation 16): ``[B]``.

    The bound trains the variance alone: the mean that it sees is a constant.

    Args:
        predict: ``(x_t, t)`` to the prediction and the variance, ``[B, 2 C, H, W]``.
        x0, batch: as of `denoising_loss`.
    """
    objective, noise = bound.objective, batch["noise"]
    t = objective.timesteps(batch["u"], x0)
    x_t = objective.noise(x0, batch.get("input_noise", noise), t)
    pred, v = predict(x_t, t).chunk(2, 1)
    simple = denoising_loss(objective, lambda *_: pred, x0, batch)
    estimate = objective.x0(x_t, pred.detach().to(x_t), t)
    vlb = len(objective.alphas_cumprod) * bound.term(x0, x_t, estimate, bound.log_variance(v.to(x0), t), t)
    return simple + SCALE * vlb
