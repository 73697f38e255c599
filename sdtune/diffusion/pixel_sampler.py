"""Drawing from a diffusion model of pixels: a ``UNet2DModel`` and any scheduler of diffusers.

Image k is a function of the k-th seed alone: it starts from ``torch.Generator("cpu").manual_seed(seed)``, and the noise
of every step comes from the same generator. So stock ``DDPMPipeline`` and ``DDIMPipeline``, given that generator and
a batch of one, draw the same picture.

A network that learned its variance (Nichol & Dhariwal 2021) says the prediction in the first half of its channels and
the variance in the second. DDPM's sampler reads both; of every other, and of a fixed variance, only the first is used.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from sdtune.config.sections import UserError
from sdtune.diffusion.guidance import classifier_free, rescaled, reverse_variance, shifted, shifted_mean
from sdtune.diffusion.guides import Guide
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.schedulers import Scheduler, alpha_bars
from sdtune.diffusion.variational_bound import LEARNED, between


class PixelNetwork(Protocol):
    """What is used here of a ``UNet2DModel``."""

    config: Any
    device: torch.device
    dtype: torch.dtype

    def __call__(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any: ...
    def modules(self) -> Iterator[nn.Module]: ...


@torch.no_grad()
def draw(
    unet: PixelNetwork,
    scheduler: Scheduler,
    seeds: Sequence[int],
    *,
    steps: int,
    labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    guides: Sequence[Guide] = (),
    start: tuple[Tensor, int] | None = None,
    eta: float = 0.0,
    batch_size: int = 64,
    watch: Callable[[int, Tensor], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """An image for each seed: float32 ``[N, C, H, W]`` on the CPU, in [-1, 1].

    Neither ``scheduler`` nor the training mode of ``unet`` is changed.

    Args:
        steps: denoising steps.
        labels: class of each image, int64 ``[N]``; ``None`` is the null class of a model with classes.
        guidance_scale: see `guidance.classifier_free`; 1 asks the network once a step.
        guidance_rescale: see `guidance.rescaled`.
        guides: what else steers the images: by algorithm 1 of Dhariwal & Nichol 2021 where the scheduler is DDPM's,
            by algorithm 2 with every other.
        start: images ``[N, C, H, W]`` in [-1, 1] and the timestep to noise them to, in place of pure noise. Steps begin
            at the first timestep of the scheduler that is no later. For DDPM and DDIM.
        eta: noise of DDIM, from 0 (none) to 1 (that of DDPM); other schedulers have their own.
        watch: called in each step with the timestep and the estimates of x0 ``[B, C, H, W]``.
        progress: called with the share done, 0 to 1.

    Raises:
        UserError: for more steps than the model has, and for what the scheduler or the model does not know.
    """
    scheduler = copy.deepcopy(scheduler)
    _check(unet, scheduler, steps, labels, eta)
    bars = alpha_bars(scheduler)
    process = DDPM(bars, scheduler.config.prediction_type)  # by number of the step, not by timestep
    ancestral = isinstance(scheduler, DDPMScheduler)
    learned = ancestral and scheduler.config.variance_type == LEARNED
    first = _first_step(scheduler, start[1]) if start else 0
    clips = scheduler.config.get("clip_sample") and not scheduler.config.get("thresholding")
    limit = scheduler.config.get("clip_sample_range", 1.0) if clips else None
    through_network = any(guide.sees_x0 for guide in guides)
    drawn = []
    with evaluating(unet):
        for done in range(0, len(seeds), batch_size):
            rows = slice(done, done + batch_size)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
            predict = _predictor(unet, len(generators), labels, rows, guidance_scale, guidance_rescale)
            scheduler.set_timesteps(steps)  # some remember the steps of the batch before
            options = _accepted(scheduler, generator=generators, eta=eta)
            x = _noise(unet, generators) * scheduler.init_noise_sigma
            if start:
                x = scheduler.add_noise(start[0][rows].to(x), x, scheduler.timesteps[first].expand(len(x)))
            for k in range(first, len(bars)):
                t = scheduler.timesteps[k]
                with torch.set_grad_enabled(through_network):
                    x_t = scheduler.scale_model_input(x, t).detach().requires_grad_(bool(guides))
                    pred, v = predict(x_t, t).tensor_split([x.shape[1]], dim=1)
                    x0 = process.x0(x_t, pred, torch.full((len(x),), k))
                gradient = _gradient(guides, x_t, t, x0, rows) if guides else None
                pred, x0 = pred.detach(), x0.detach()
                if watch:
                    watch(int(t), x0)
                if gradient is not None and not ancestral:
                    pred = shifted(pred, x0, gradient, float(bars[k]), process.prediction, limit)
                said = torch.cat([pred, v.detach()], 1) if learned else pred
                x = scheduler.step(said, t, x, **options).prev_sample
                if gradient is not None and ancestral:
                    x = shifted_mean(x, gradient, _variance(scheduler, bars, k, v.detach()))
                if progress:
                    progress((done + len(x) * (k + 1 - first) / (len(bars) - first)) / len(seeds))
            drawn.append(x.float().cpu().clamp(-1, 1))
    return torch.cat(drawn)


@torch.no_grad()
def draw_consistency(
    unet: PixelNetwork,
    scheduler: Any,
    seeds: Sequence[int],
    *,
    steps: int,
    labels: Tensor | None = None,
    batch_size: int = 64,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """An image for each seed by a consistency model (Song et al. 2023, algorithm 1), as `draw` returns them.

    Args:
        scheduler: diffusers' CMStochasticIterativeScheduler; it is not changed.

    Raises:
        UserError: for more steps than the model has noise levels.
    """
    scheduler = copy.deepcopy(scheduler)
    if steps >= scheduler.config.num_train_timesteps:
        raise UserError(f"--steps {steps}: this model has {scheduler.config.num_train_timesteps} noise levels")
    drawn = []
    with evaluating(unet):
        for done in range(0, len(seeds), batch_size):
            rows = slice(done, done + batch_size)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
            predict = _predictor(unet, len(generators), labels, rows, 1.0, 0.0)
            scheduler.set_timesteps(steps)
            x = _noise(unet, generators) * scheduler.init_noise_sigma
            for k, t in enumerate(scheduler.timesteps):
                pred = predict(scheduler.scale_model_input(x, t), t)
                x = scheduler.step(pred, t, x, generator=generators).prev_sample
                if progress:
                    progress((done + len(x) * (k + 1) / steps) / len(seeds))
            drawn.append(x.float().cpu().clamp(-1, 1))
    return torch.cat(drawn)


def to_images(x: Tensor) -> list[Image.Image]:
    """``[N, C, H, W]`` in [-1, 1] as pictures: 1 channel is L, 2 LA, 3 RGB, 4 RGBA."""
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels]


def _predictor(
    unet: PixelNetwork, count: int, labels: Tensor | None, rows: slice, scale: float, share: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """``(x_t, t)`` to the prediction of the network for some images, guided by their classes."""
    if unet.config.num_class_embeds is None:
        return lambda x_t, t: unet(x_t, t).sample
    null = torch.full((count,), unet.config.num_class_embeds - 1, device=unet.device)
    if labels is None:
        return lambda x_t, t: unet(x_t, t, class_labels=null).sample
    chosen = labels[rows].to(unet.device)
    if scale == 1:
        return lambda x_t, t: unet(x_t, t, class_labels=chosen).sample
    both = torch.cat([null, chosen])

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = unet(torch.cat([x_t, x_t]), t, class_labels=both).sample.chunk(2)
        channels = x_t.shape[1]  # a learned variance is not guided
        asked = conditional[:, :channels]
        guided = classifier_free(unconditional[:, :channels], asked, scale)
        guided = rescaled(guided, asked, share) if share else guided
        return torch.cat([guided, conditional[:, channels:]], 1)

    return predict


def _noise(unet: PixelNetwork, generators: list[torch.Generator]) -> Tensor:
    size = unet.config.sample_size
    shape = (len(generators), unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    noise: Tensor = randn_tensor(shape, generator=generators, device=unet.device, dtype=unet.dtype)
    return noise


def _accepted(scheduler: Scheduler, **options: Any) -> dict[str, Any]:
    """Those of ``options`` that a step of the scheduler takes: the deterministic ones take no generator."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in options.items() if name in known}


def _gradient(guides: Sequence[Guide], x_t: Tensor, t: Tensor, x0: Tensor, rows: slice) -> Tensor:
    """Gradient by ``x_t`` of what all guides say together."""
    with torch.enable_grad():
        log_likelihood = torch.stack([guide(x_t, t, x0, rows).sum() for guide in guides]).sum()
    return torch.autograd.grad(log_likelihood, x_t)[0].to(x_t)


def _variance(scheduler: Scheduler, bars: Tensor, k: int, v: Tensor) -> float | Tensor:
    """What the ``k``-th step of a DDPM scheduler adds noise of; of a learned variance for each pixel, by ``v``."""
    previous = float(bars[k + 1]) if k + 1 < len(bars) else 1.0
    small, large = (reverse_variance(float(bars[k]), previous, large=of) for of in (False, True))
    if scheduler.config.variance_type == LEARNED:
        return between(v, math.log(max(small, 1e-20)), math.log(large)).exp()
    return large if "large" in scheduler.config.variance_type else small


def _first_step(scheduler: Scheduler, timestep: int) -> int:
    """The first step that is no earlier in the noise than ``timestep``."""
    if not isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        raise UserError(f"--interpolate: {type(scheduler).__name__} starts from noise only; --scheduler ddim does not")
    last, given = scheduler.config.num_train_timesteps - 1, f"--interpolate-timestep {timestep}"
    if timestep > last:
        raise UserError(f"{given}: the last of this model is {last}")
    later = [k for k, t in enumerate(scheduler.timesteps) if t <= timestep]
    if not later:
        raise UserError(f"{given}: these steps end at {int(scheduler.timesteps[-1])}")
    return later[0]


def _check(unet: PixelNetwork, scheduler: Scheduler, steps: int, labels: Tensor | None, eta: float) -> None:
    """Raise `UserError` for what cannot be drawn, and set the timesteps."""
    if labels is not None and unet.config.num_class_embeds is None:
        raise UserError("this model has no classes to choose from")
    check_output(unet, scheduler)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{type(scheduler).__name__} knows no betas, so it is no sampler of this model")
    if steps > scheduler.config.num_train_timesteps:
        raise UserError(f"--steps {steps}: this model has {scheduler.config.num_train_timesteps} timesteps")
    if eta and not _accepted(scheduler, eta=eta):
        raise UserError(f"--eta: the noise of --scheduler ddim, and {type(scheduler).__name__} has its own")
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UserError(f"--steps {steps}: {str(error).splitlines()[0]}") from error


def check_output(unet: PixelNetwork, scheduler: Scheduler) -> None:
    """Raises: UserError for a network whose output is neither the prediction nor that and a learned variance."""
    variance, out = scheduler.config.get("variance_type"), unet.config.out_channels / unet.config.in_channels
    if out not in (1, 2) or variance == "learned" or (variance == LEARNED and out == 1):
        raise UserError(
            f"a network of {unet.config.in_channels} channels with {unet.config.out_channels} of output, and a "
            f"scheduler whose variance_type is {variance}: only twice the channels and {LEARNED} is sampled here"
        )


@contextmanager
def evaluating(*models: PixelNetwork) -> Iterator[None]:
    """Modules in training mode are put in evaluation mode, and back."""
    training = [m for model in models for m in model.modules() if m.training]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True
