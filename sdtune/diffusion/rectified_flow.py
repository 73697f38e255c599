"""Rectified flow (Liu et al. 2022; Esser et al. 2024): straight paths from image to noise, and a velocity to regress.

    x_t = (1 - t) x_0 + t noise        v = noise - x_0        t in (0, 1): 0 is the image, 1 the noise

Esser et al. is "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", whose equations are named
below. Nothing here draws a random number (see ``objective``).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sdtune.config.fields import flag
from sdtune.config.sections import BaseOptions, Denoising, UserError
from sdtune.diffusion.objective import distance, per_image

Density = Literal["uniform", "logit_normal", "mode"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]


OF_SCHEME = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
"""Options that one weighting scheme alone reads."""


class ResolutionShift(NamedTuple):
    """How the shift grows with the number of image tokens, as schedulers with ``use_dynamic_shifting`` say it.

    mu is linear in the tokens, through ``base_shift`` at ``base_tokens`` and ``max_shift`` at ``max_tokens``; the shift
    is ``exp(mu)``, or mu itself where the scheduler's ``time_shift_type`` is linear.
    """

    base_tokens: int
    max_tokens: int
    base_shift: float
    max_shift: float
    exponential: bool
    patch: int
    """Elements of a latent per image token, along a side."""

    @classmethod
    def of(cls, config: Any, patch: int) -> "ResolutionShift":
        """From the configuration of a ``FlowMatchEulerDiscreteScheduler``."""
        ends = (config["base_image_seq_len"], config["max_image_seq_len"], config["base_shift"], config["max_shift"])
        return cls(*ends, config["time_shift_type"] == "exponential", patch)

    def at(self, x0: Tensor) -> float:
        """The shift for latents ``[B, C, h, w]``."""
        tokens = (x0.shape[-2] // self.patch) * (x0.shape[-1] // self.patch)
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.exponential else mu


Shift = float | ResolutionShift
"""How far times are moved towards the noise: a number, of which 1 is none, or by resolution."""


def shifted(t: Tensor, shift: Shift, x0: Tensor) -> Tensor:
    """Times moved towards the noise (Esser et al., equation 23), for latents like ``x0``."""
    by = shift.at(x0) if isinstance(shift, ResolutionShift) else shift
    return by * t / (1 + (by - 1) * t)


def sampling_shift(scheduler: Any, patch: int) -> Shift:
    """How a ``FlowMatchEulerDiscreteScheduler`` shifts its times when it samples."""
    config = scheduler.config
    return ResolutionShift.of(config, patch) if config["use_dynamic_shifting"] else float(config["shift"])


class RectifiedFlow:
    """The objective of bases that were made by flow matching.

    Args:
        density: of t before the shift: ``uniform``, ``logit_normal`` (Esser et al., equation 19) or ``mode``
            (equation 20).
        shift: of t towards the noise (equation 23), a number (1 is none) or by resolution.
        weighting: of the loss: ``none``, ``sigma_sqrt`` (t^-2) or ``cosmap`` (equation 21).
        mean, std: of the logit of t, where it is normal; a larger mean is noisier.
        mode_scale: the paper's s; 0 is uniform.
        huber_c: width of the quadratic part of the pseudo-Huber loss (Song & Dhariwal 2023); ``None`` is L2.
    """

    def __init__(
        self,
        density: Density = "uniform",
        shift: Shift = 1.0,
        weighting: Weighting = "none",
        mean: float = 0.0,
        std: float = 1.0,
        mode_scale: float = 1.29,
        huber_c: float | None = None,
    ):
        self.density, self.shift, self.weighting = density, shift, weighting
        self.mean, self.std, self.mode_scale, self.huber_c = mean, std, mode_scale, huber_c

    @classmethod
    def of(cls, options: BaseOptions, loss: Denoising, scheduler: Any, density: Density, patch: int) -> "RectifiedFlow":
        """The objective of a run.

        Args:
            scheduler: the base's own, a ``FlowMatchEulerDiscreteScheduler``.
            density: what the base was made with, for ``--weighting-scheme base``.
            patch: elements of a latent per image token, along a side.

        Raises: UserError for an option of another scheme.
        """
        scheme = density if options.weighting_scheme == "base" else options.weighting_scheme
        for name, needed in OF_SCHEME.items():
            if scheme != needed and getattr(options, name) != BaseOptions.model_fields[name].get_default():
                raise UserError(f"{flag(name)}: is for --weighting-scheme {needed}, and it is {scheme}; leave it out")
        if options.resolution_shift:
            shift: Shift = ResolutionShift.of(scheduler.config, patch)
        elif options.timestep_shift:
            shift = options.timestep_shift
        else:
            shift = 1.0 if scheduler.config["use_dynamic_shifting"] else scheduler.config["shift"]
        return cls(
            scheme if scheme in ("logit_normal", "mode") else "uniform",
            shift,
            scheme if scheme in ("sigma_sqrt", "cosmap") else "none",
            options.logit_mean,
            options.logit_std,
            options.mode_scale,
            loss.huber_c if loss.loss_type == "huber" else None,
        )

    def timesteps(self, u: Tensor, x0: Tensor) -> Tensor:
        """The time at quantile ``u`` in [0, 1) of the training distribution, for latents like ``x0``: fp32 ``[B]``.

        ``mode`` falls with ``u``; as the density is symmetric about 1/2, it is turned to rise.
        """
        match self.density:
            case "logit_normal":
                t = (self.mean + self.std * torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))).sigmoid()
            case "mode":
                t = u + self.mode_scale * ((math.pi / 2 * u).cos().square() - 1 + u)
            case _:
                t = u
        return shifted(t, self.shift, x0).float()

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``1 - t`` and ``t``, in the dtype of ``like`` and shaped to multiply it."""
        return per_image(1 - t, like).to(like), per_image(t, like).to(like)

    def noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` (Esser et al., equation 13)."""
        a, s = self.scales(t, x0)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity that the network should say at ``(x_t, t)``."""
        return noise - x0

    def x0(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        """The image that a predicted velocity stands for."""
        return x_t - self.scales(t, x_t)[1] * pred

    def epsilon(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        """The noise that a predicted velocity stands for."""
        return x_t + self.scales(t, x_t)[0] * pred

    def weight(self, t: Tensor) -> Tensor:
        """The weight of the loss at ``t``: ``[B]``."""
        match self.weighting:
            case "sigma_sqrt":
                return t**-2
            case "cosmap":
                return 2 / (math.pi * (1 - 2 * t + 2 * t * t))
        return torch.ones_like(t)

    def distance(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return distance(pred, target, self.huber_c, mask)
