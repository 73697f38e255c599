"""The forward process, what the network regresses, and the loss of one image.

DDPM is here; ``rectified_flow`` is the other objective. Each trains on ``x_t = a_t x_0 + s_t noise`` and regresses one
linear combination of ``x_0`` and ``noise``. Nothing here draws a random number: noise and the uniform number behind
each timestep come with the batch, because they are functions of a sample's position in the run (see ``draws``).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sdtune.config.sections import Denoising, UserError
from sdtune.diffusion.tables import Table

Prediction = Literal["epsilon", "v_prediction", "sample"]


class Objective(Protocol):
    """What ``denoising_loss`` needs to know of a diffusion. Timesteps are ``[B]``: int64 of DDPM, fp32 of a flow."""

    def timesteps(self, u: Tensor, x0: Tensor) -> Tensor: ...
    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]: ...
    def noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def epsilon(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor: ...
    def weight(self, t: Tensor) -> Tensor: ...
    def distance(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor: ...


def per_image(x: Tensor, like: Tensor) -> Tensor:
    """``[B]`` shaped to multiply ``like`` ``[B, ...]``."""
    return x.reshape(-1, *[1] * (like.ndim - 1))


def bias_timesteps(
    steps: int, strategy: str, multiplier: float, begin: int = 0, end: int = 1000, portion: float = 0.25
) -> Tensor:
    """How often each timestep is drawn, relative to the others: float64 ``[steps]``.

    ``earlier`` and ``later`` multiply the first and the last ``portion`` (towards the noise) of the timesteps,
    ``range`` those from ``begin`` up to ``end``; ``none`` leaves all alike.

    Raises:
        UserError: the range is of timesteps that there are not.
    """
    if strategy == "range" and (begin >= steps or (end > steps and end != 1000)):  # 1000 is the default
        name, value = ("begin", begin) if begin >= steps else ("end", end)
        raise UserError(f"--timestep-bias-{name} {value}: the schedule has the timesteps 0 to {steps - 1}")
    odds = torch.ones(steps, dtype=torch.float64)
    biased = int(portion * steps)
    chosen = {
        "none": slice(0, 0),
        "earlier": slice(0, biased),
        "later": slice(steps - biased, steps),
        "range": slice(begin, end),
    }[strategy]
    odds[chosen] *= multiplier
    return odds


class DDPM:
    """Variance-preserving discrete diffusion (Ho et al. 2020, equation 4), regressing noise, velocity or image.

    Args:
        alphas_cumprod: the paper's alpha-bar, ``[T]``.
        prediction: ``epsilon`` (Ho et al. 2020), ``v_prediction`` (Salimans & Ho 2022) or ``sample``.
        snr_gamma: clip of the min-SNR loss weight (Hang et al. 2023); ``None`` weighs all timesteps alike.
        timestep_odds: relative frequency of each timestep, ``[T]``; ``None`` is uniform.
        huber_c: width of the quadratic part of the pseudo-Huber loss (Song & Dhariwal 2023); ``None`` is L2.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction: Prediction = "epsilon",
        snr_gamma: float | None = None,
        timestep_odds: Tensor | None = None,
        huber_c: float | None = None,
    ):
        self.alphas_cumprod = alphas_cumprod.double()
        self.prediction, self.snr_gamma, self.huber_c = prediction, snr_gamma, huber_c
        odds = torch.ones(len(alphas_cumprod)) if timestep_odds is None else timestep_odds
        self.quantiles = Table((odds.double() / odds.double().sum()).cumsum(0))
        self.signal, self.spread = Table(self.alphas_cumprod.sqrt()), Table((1 - self.alphas_cumprod).sqrt())
        self.weights = Table(self._weights())
        self.log_sigma = Table(((1 - self.alphas_cumprod) / self.alphas_cumprod).log() / 2)
        self._grids: dict[int, Table] = {}

    @classmethod
    def of(cls, cfg: Denoising, scheduler: Any) -> "DDPM":
        """The objective of a run: what ``cfg`` says of the loss, on the noise schedule of a diffusers scheduler."""
        alphas = scheduler.alphas_cumprod
        bias = (cfg.timestep_bias_strategy, cfg.timestep_bias_multiplier, cfg.timestep_bias_begin)
        odds = bias_timesteps(len(alphas), *bias, cfg.timestep_bias_end, cfg.timestep_bias_portion)
        huber_c = cfg.huber_c if cfg.loss_type == "huber" else None
        return cls(alphas, scheduler.config.prediction_type, cfg.snr_gamma, odds, huber_c)

    def timesteps(self, u: Tensor, x0: Tensor | None = None) -> Tensor:
        """The timestep at quantile ``u`` in [0, 1) of the training distribution, whatever the images: int64 ``[B]``."""
        quantiles = self.quantiles.on(u.device)
        t = torch.searchsorted(quantiles, u.to(quantiles), right=True)
        return t.clamp(max=len(quantiles) - 1)  # cumsum may end a rounding error below 1

    def grid(self, count: int, device: torch.device) -> Tensor:
        """The last timestep of each of ``count`` equal parts, after -1, the clean image: int64 ``[count + 1]``.

        It is that of DDIM with trailing timesteps (Lin et al. 2023, section 3.3), and of LCMScheduler.
        """
        if count not in self._grids:
            self._grids[count] = Table(torch.arange(count + 1) * len(self.alphas_cumprod) // count - 1)
        return self._grids[count].on(device)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``a_t`` and ``s_t``, in the dtype of ``like`` and shaped to multiply it."""
        a, s = self.signal.at(t, like.dtype), self.spread.at(t, like.dtype)
        return per_image(a, like), per_image(s, like)

    def noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` (Ho et al. 2020, equation 4)."""
        a, s = self.scales(t, x0)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say at ``(x_t, t)``."""
        a, s = self.scales(t, x0)
        match self.prediction:
            case "epsilon":
                return noise
            case "v_prediction":
                return a * noise - s * x0
            case "sample":
                return x0

    def x0(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        """The image that a prediction stands for; infinite for ``epsilon`` at zero terminal SNR."""
        a, s = self.scales(t, x_t)
        match self.prediction:
            case "epsilon":
                return (x_t - s * pred) / a
            case "v_prediction":
                return a * x_t - s * pred
            case "sample":
                return pred

    def epsilon(self, x_t: Tensor, pred: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction stands for."""
        a, s = self.scales(t, x_t)
        match self.prediction:
            case "epsilon":
                return pred
            case "v_prediction":
                return a * pred + s * x_t
            case "sample":
                return (x_t - a * pred) / s

    def step(self, x_t: Tensor, pred: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """``x`` at timestep ``to`` by DDIM without noise (Song et al. 2020, equation 12); -1 is the clean image."""
        a, s = self.scales_or_clean(to, x_t)
        return a * self.x0(x_t, pred, t) + s * self.epsilon(x_t, pred, t)

    def scales_or_clean(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`scales`, where timestep -1 is the clean image: 1 and 0."""
        a, s = self.scales(t.clamp(min=0), like)
        clean = per_image(t < 0, like)
        return torch.where(clean, 1.0, a), torch.where(clean, 0.0, s)

    def weight(self, t: Tensor) -> Tensor:
        """Min-SNR-gamma (Hang et al. 2023, section 3.4): ``min(snr, gamma)`` on x_0, as a weight on ``pred``: ``[B]``.

        An error of x_0 is ``1 / snr`` times that of noise and ``1 / (snr + 1)`` times that of velocity. Without gamma
        the weight is 1 on noise (Ho et al. 2020, equation 14) and on velocity, and ``snr`` on x_0, which makes the loss
        that of noise (Salimans & Ho 2022, section 4).
        """
        return self.weights.at(t)

    def _weights(self) -> Tensor:
        """The weight of each timestep, float32 ``[T]``."""
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        if self.snr_gamma is None and self.prediction != "sample":
            return torch.ones(len(snr))
        if self.snr_gamma is None:
            return snr.float()
        match self.prediction:
            case "epsilon":
                weight = (self.snr_gamma / snr).clamp(max=1)  # the limit 1 at zero SNR comes out right
            case "v_prediction":
                weight = snr.clamp(max=self.snr_gamma) / (snr + 1)
            case "sample":
                weight = snr.clamp(max=self.snr_gamma)
        return weight.float()

    def distance(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return distance(pred, target, self.huber_c, mask)


def distance(pred: Tensor, target: Tensor, huber_c: float | None, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each image, or pseudo-Huber error of width ``huber_c``, in float32: ``[B]``.

    Args:
        mask: weights of the mean, at least 0 and not all 0, ``[B, 1, H, W]``.
    """
    squared = (pred.float() - target.float()).square()
    if huber_c is not None:
        squared = (squared + huber_c**2).sqrt() - huber_c
    if mask is not None:
        squared = squared * (mask / mask.mean(dim=(1, 2, 3), keepdim=True))
    return squared.flatten(1).mean(1)


@torch.no_grad()
def dream(
    objective: Objective,
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    batch: Mapping[str, Tensor],
    detail_preservation: float,
) -> Tensor:
    """Noise that holds some of the network's own error, as it will in sampling (DREAM; Zhou et al. 2023).

    The paper's rectified input and target, its equations 8 and 9, are those of the ordinary loss at the noise
    ``eps + s_t^p (eps - eps_theta(x_t, t))``: small steps keep detail, large ones learn from themselves.

    Args:
        detail_preservation: the paper's ``p``; more keeps closer to the ordinary loss.

    Returns:
        What takes the place of ``batch["noise"]``: like ``x0``.
    """
    t, noise = objective.timesteps(batch["u"], x0), batch["noise"]
    x_t = objective.noise(x0, noise, t)
    predicted = objective.epsilon(x_t, predict(x_t, t).to(x_t), t)
    _, s = objective.scales(t, x_t)
    return noise + s**detail_preservation * (noise - predicted)


def denoising_loss(
    objective: Objective, predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, batch: Mapping[str, Tensor]
) -> Tensor:
    """One Monte Carlo sample of the training loss of each image (Ho et al. 2020, equation 14): ``[B]``.

    Args:
        predict: ``(x_t, t) -> pred``, the network with its conditioning bound.
        x0: clean images or latents ``[B, C, H, W]``.
        batch: ``u`` ``[B]`` uniform in [0, 1), ``noise`` like ``x0``, and, under input perturbation
            (Ning et al. 2023), the noise that the input gets in its place as ``input_noise``; with masks, the
            weights ``mask`` ``[B, 1, H, W]`` of the error at each place.
    """
    t, noise = objective.timesteps(batch["u"], x0), batch["noise"]
    x_t = objective.noise(x0, batch.get("input_noise", noise), t)
    target = objective.target(x0, noise, t)
    return objective.distance(predict(x_t, t), target, batch.get("mask")) * objective.weight(t)
