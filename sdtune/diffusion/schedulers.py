"""Samplers by name, made to fit the model they sample."""

import inspect
from importlib.util import find_spec
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from torch import Tensor

from sdtune.config.sections import OutOfRange, UserError


class Scheduler(Protocol):
    """What is used here of a scheduler of diffusers, whose own base class declares none of it."""

    config: Any
    alphas_cumprod: Tensor
    """The paper's alpha-bar at each timestep of training."""
    timesteps: Tensor
    """Those of sampling, once `set_timesteps` has chosen them."""
    init_noise_sigma: float

    def set_timesteps(self, num_inference_steps: int) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any: ...


SCHEDULERS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
KARRAS = "-karras"
"""Ending of the names of those that step through the noise levels of Karras et al. (2022), eq. 5."""
PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
"""What defines the forward process that the model was trained on."""


def make_scheduler(name: str, base: Scheduler, clip: bool = False) -> Scheduler:
    """The sampler ``name`` for a model that ``base`` samples; raises `UserError` where it cannot.

    As ``from_config``, which however puts the new class's defaults in place of those of the base's class:
    here what defines the forward process is kept, and PNDM starts as in Stable Diffusion.

    Args:
        clip: estimates of x0 are clipped to [-1, 1] unless ``base`` says otherwise, as fits pixels; latents are not.
    """
    name, karras = name.removesuffix(KARRAS), name.endswith(KARRAS)
    chosen = SCHEDULERS[name]
    process = {k: base.config[k] for k in PROCESS if k in base.config}
    if "beta_schedule" not in process:
        raise UserError(f"--scheduler {name} cannot sample a model made for {type(base).__name__}: leave it out")
    if base.config.get("rescale_betas_zero_snr"):
        if "rescale_betas_zero_snr" not in inspect.signature(chosen.__init__).parameters:
            raise UserError(f"--scheduler {name} knows no zero-terminal-SNR schedule, which this base has")
        process["rescale_betas_zero_snr"] = True
    if base.config.get("thresholding") and "thresholding" not in inspect.signature(chosen.__init__).parameters:
        raise UserError(f"--scheduler {name} knows no dynamic thresholding; add --out-of-range keep, or take ddim")
    if name == "lms" and find_spec("scipy") is None:
        raise UserError("--scheduler lms needs scipy: pip install scipy")
    defaults = base.config.get("_use_default_values", ())
    given = {k: v for k, v in base.config.items() if k not in defaults and k != "_use_default_values"}
    usual = {"skip_prk_steps": True} if name == "pndm" else {"clip_sample": clip}
    if name == "heun" and process["beta_schedule"] == "squaredcos_cap_v2":
        # Its last timestep has a thousand times the noise of the next: no straight line corrects such a step.
        given |= {"timestep_spacing": "leading"}
    if karras:
        given |= {"use_karras_sigmas": True}
    learned = given.get("variance_type") == "learned_range"
    if learned and name != "ddpm":  # the others have no use for it, and DPM-Solver takes three channels for the image
        del given["variance_type"]
    scheduler: Scheduler = chosen.from_config({**usual, **given, **process})
    try:  # what a class can predict from, only its step tells
        probe = torch.zeros(1, 1, 1, 1)
        said = torch.zeros(1, 2, 1, 1) if learned and name == "ddpm" else probe
        trial = chosen.from_config(scheduler.config)
        trial.set_timesteps(4)
        trial.step(said, trial.timesteps[0], trial.scale_model_input(probe, trial.timesteps[0]))
    except (ValueError, NotImplementedError) as error:
        predicts = process["prediction_type"]
        raise UserError(f"--scheduler {name} cannot sample a model that predicts {predicts}") from error
    return scheduler


def range_settings(cfg: OutOfRange) -> dict[str, Any]:
    """What diffusers' schedulers call the options of ``cfg``; empty where the model's own are kept."""
    if cfg.out_of_range is None:
        return {}
    if cfg.out_of_range != "threshold":
        return {"clip_sample": cfg.out_of_range == "clip", "thresholding": False}
    ratio, most = cfg.dynamic_thresholding_ratio, cfg.sample_max_value
    return {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": most}


def choose_scheduler(name: str | None, base: Scheduler, cfg: OutOfRange) -> Scheduler:
    """The sampler ``name`` of a model of pixels, by default its own, ``base``; estimates out of range as ``cfg`` says.

    Raises:
        UserError: the sampler, or that, is not for this model.
    """
    settings, kind = range_settings(cfg), type(base)
    if settings:
        base = kind.from_config(base.config, **settings)  # type: ignore[attr-defined]
    chosen = make_scheduler(name, base, clip=True) if name else base
    unknown = settings.keys() - inspect.signature(type(chosen).__init__).parameters.keys()
    if unknown and cfg.out_of_range != "keep":
        raise UserError(f"--out-of-range {cfg.out_of_range}: {type(chosen).__name__} does not; --scheduler ddim does")
    return chosen


def with_variance(scheduler: Scheduler, kind: str) -> Scheduler:
    """DDPM's sampler with another variance; `UserError` for every other sampler."""
    if not isinstance(scheduler, diffusers.DDPMScheduler):
        raise UserError(f"--variance-type: is for --scheduler ddpm; {type(scheduler).__name__} sets its own noise")
    chosen: Scheduler = diffusers.DDPMScheduler.from_config(scheduler.config, variance_type=kind)
    return chosen


def lcm_scheduler(base: Scheduler, **settings: Any) -> Scheduler:
    """The sampler of latent consistency models for a base, with ``settings`` of its own."""
    scheduler: Any = make_scheduler("lcm", base)
    made: Scheduler = type(scheduler).from_config(scheduler.config, **settings)
    return made


def alpha_bars(scheduler: Scheduler) -> Tensor:
    """The paper's alpha-bar (Ho et al. 2020) at each of the scheduler's timesteps: float64 ``[steps]``.

    Where Euler, Heun and LMS are set between two timesteps, the noise over the signal is interpolated, as they do it.
    """
    known: Tensor = scheduler.alphas_cumprod.double().cpu()
    t: Tensor = scheduler.timesteps.double().cpu()
    if torch.equal(t, t.round()):
        return known[t.long()]
    sigmas = ((1 - known) / known).sqrt().numpy()
    between = torch.from_numpy(np.interp(t.numpy(), np.arange(len(sigmas)), sigmas))
    bars: Tensor = 1 / (1 + between.square())
    return bars
