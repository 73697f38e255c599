"""``--bound`` of ``sdtune evaluate``: the variational bound of a model of pixels, in bits a dimension.

It says how well the model compresses pictures that it has not seen, and draws none. Every timestep of each picture is
looked at once. The noise of a picture follows from the seed and its place in the reference. The same predictions are
scored with beta-tilde and beta as the variance, and with the learned one if the model has it.
"""

import math
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.config.sections import Source, UserError
from sdtune.config.verbs import EvaluateConfig, SampleConfig
from sdtune.data import MODES, Stream
from sdtune.data.pixel_dataset import lost_channels
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.pixel_sampler import PixelNetwork, check_output, evaluating
from sdtune.diffusion.variational_bound import LEARNED, VariationalBound
from sdtune.evaluation.distances import Estimate
from sdtune.evaluation.features import progress
from sdtune.evaluation.inputs import classes_of_pixels, read
from sdtune.evaluation.scores import Bootstrap, mean_of
from sdtune.models.loading import load_pipeline
from sdtune.models.pixel_networks import sides_of
from sdtune.run.rng import generator

BATCH = 250
"""Timesteps of a picture that the network sees at once."""


def measure(cfg: EvaluateConfig) -> tuple[dict[str, Estimate], int]:
    """The bound by variance, each the mean over the pictures of the reference, and how many those are.

    Raises:
        UserError: SAMPLES is no DDPM of pixels, or the reference has pictures that it or ``levels`` does not fit.
    """
    if classes_of_pixels(cfg.samples) is None:
        raise UserError(f"--bound: SAMPLES {cfg.samples} is no model of pixels, such as one of sdtune ddpm")
    pipeline = load_pipeline(SampleConfig(model=cfg.samples))
    unet, scheduler = pipeline.unet, pipeline.scheduler
    if not isinstance(scheduler, DDPMScheduler):
        raise UserError(
            f"--bound: is of DDPM's steps, and SAMPLES {cfg.samples} is sampled by {type(scheduler).__name__}"
        )
    check_output(unet, scheduler)
    bound = VariationalBound(DDPM(scheduler.alphas_cumprod, scheduler.config.prediction_type), cfg.levels)
    limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf
    learned = scheduler.config.variance_type == LEARNED
    shown = pictures(cfg, unet)
    found: dict[str, list[float]] = {}
    with evaluating(unet), progress() as bar:
        for k, x0 in enumerate(bar.track(shown, description="Bound")):
            noise = generator(cfg.seed, "bound", k)
            for name, bits in bits_of(unet, bound, x0.to(unet.device), noise, limit, learned).items():
                found.setdefault(name, []).append(bits)
    bootstrap = Bootstrap(cfg.resamples, cfg.seed)
    scores: dict[str, Estimate] = {}
    for name, values in found.items():
        scores |= mean_of(name, torch.tensor(values, dtype=torch.float64), bootstrap)
    return scores, len(shown)


def pictures(cfg: EvaluateConfig, unet: PixelNetwork) -> list[Tensor]:
    """The reference, or the part of it that a run held out, as the model sees it: each ``[C, H, W]`` in [-1, 1].

    Raises:
        UserError: a picture has more channels than the model, or values between the levels.
    """
    images, mode = read("--reference", cfg.reference, cfg), MODES[unet.config.in_channels]
    if lossy := [row.name for row in images.rows if lost_channels(row, mode)]:
        raise UserError(f"--reference {cfg.reference}: {lossy[0]} has other channels than {mode}, those of the model")
    height, width = sides_of(unet.config.sample_size)
    options: dict[str, Any] = {name: getattr(cfg, name) for name in Source.model_fields}
    options |= {"width": width, "height": height, "resolution": min(width, height)}
    options |= {"num_holdout_images": cfg.num_holdout_images, "seed": cfg.seed}
    stream = Stream(DdpmConfig(dataset=cfg.reference, **options), images, 1, mode)
    samples = stream.holdout or stream.examples(len(images.rows))
    found = [stream.pixels(sample) for sample in samples]
    rounding = 0.5 * (cfg.levels - 1) / 255 + 1e-3  # of a level that a file in 8 bits holds
    for sample, x in zip(samples, found, strict=True):
        place = (x + 1) / 2 * (cfg.levels - 1)
        if (place - place.round()).abs().max() > rounding:
            raise UserError(f"--levels {cfg.levels}: {sample.name} has pixels between them; 256 fits every file")
    return found


@torch.no_grad()
def bits_of(
    unet: PixelNetwork, bound: VariationalBound, x0: Tensor, noise: torch.Generator, limit: float, learned: bool
) -> dict[str, float]:
    """The bound of one picture ``[C, H, W]`` by variance, in bits a dimension.

    Args:
        noise: draws that of each timestep.
        limit: estimates of the picture are clipped to it, as the sampler does.
    """
    objective, channels = bound.objective, x0.shape[0]
    T = len(objective.alphas_cumprod)
    total = {"bound_fixed_small": 0.0, "bound_fixed_large": 0.0} | ({"bound_learned": 0.0} if learned else {})
    null = unet.config.num_class_embeds
    for t in torch.arange(T, device=x0.device).split(BATCH):
        x = x0.expand(len(t), *x0.shape)
        x_t = objective.noise(x, torch.randn(x.shape, generator=noise).to(x), t)
        c = None if null is None else torch.full_like(t, null - 1)
        pred, v = unet(x_t, t, class_labels=c).sample.tensor_split([channels], dim=1)
        estimate = objective.x0(x_t, pred, t).clamp(-limit, limit)
        one = torch.ones_like(x)
        for name, share in zip(total, (-one, one, v), strict=False):
            total[name] += bound.term(x, x_t, estimate, bound.log_variance(share, t), t).double().sum().item()
    prior = bound.prior(x0[None]).item()
    return {name: (nats + prior) / math.log(2) for name, nats in total.items()}
