"""The noise schedule of a model of pixels, as the diffusers scheduler that is saved beside it."""

from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler

from sdtune.config.methods.classifier import ClassifierConfig
from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.config.methods.super_resolution import SuperResolutionConfig
from sdtune.config.sections import Schedule, UserError
from sdtune.diffusion.schedulers import Scheduler, range_settings

FROM_SCRATCH: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "timestep_spacing": "trailing",
}
"""The schedule of Ho et al. 2020, section 4; ``fixed_small`` is their beta-tilde, ``fixed_large`` their beta.

Samples of fewer steps than timesteps begin at the last timestep (Lin et al. 2023, section 3.3), as they begin in noise.
"""


def noise_scheduler(cfg: DdpmConfig | SuperResolutionConfig, base: Mapping[str, Any] | None = None) -> Scheduler:
    """The forward process of a model of pixels: what ``cfg`` asks for, else that of ``base``, else the paper's.

    Args:
        base: ``scheduler_config.json`` of the model that is continued.

    Raises:
        UserError: betas that do not grow; a zero terminal SNR with a network that regresses the noise; a learned
            variance with one that regresses the image.
    """
    asked: dict[str, Any] = {"prediction_type": cfg.prediction_type, "variance_type": cfg.variance_type}
    asked |= range_settings(cfg)
    scheduler = _scheduler(cfg, cfg.rescale_betas_zero_snr, base, asked)
    if scheduler.config.rescale_betas_zero_snr and scheduler.config.prediction_type == "epsilon":
        raise UserError(
            "--rescale-betas-zero-snr: pure noise says nothing of the image; add --prediction-type v_prediction"
        )
    if scheduler.config.variance_type == "learned_range" and scheduler.config.prediction_type == "sample":
        raise UserError(
            "--variance-type learned_range: with --prediction-type sample all samples become alike; "
            "take epsilon or v_prediction"
        )
    return scheduler


def classifier_scheduler(cfg: ClassifierConfig) -> Scheduler:
    """The forward process of a classifier, which regresses nothing. Raises: UserError for betas that do not grow."""
    return _scheduler(cfg, cfg.rescale_betas_zero_snr, None, {})


def _scheduler(cfg: Schedule, zero_snr: bool, base: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> Scheduler:
    asked = dict(asked) | {
        "num_train_timesteps": cfg.num_train_timesteps,
        "beta_schedule": cfg.beta_schedule,
        "beta_start": cfg.beta_start,
        "beta_end": cfg.beta_end,
    }
    chosen = FROM_SCRATCH | dict(base or {}) | {name: value for name, value in asked.items() if value is not None}
    if zero_snr:
        chosen |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if chosen["beta_start"] >= chosen["beta_end"]:
        raise UserError(f"--beta-start {chosen['beta_start']:g} is not below --beta-end {chosen['beta_end']:g}")
    scheduler: Scheduler = DDPMScheduler.from_config(chosen)
    return scheduler


def describe(scheduler: Scheduler) -> list[str]:
    """Lines that warn of a schedule whose last timestep is not noise alone; none for the others."""
    left = scheduler.alphas_cumprod[-1].item()
    if left < 0.01:
        return []
    return [
        f"the last of {len(scheduler.alphas_cumprod)} timesteps still holds {left:.0%} of an image's variance, while "
        "sampling starts from noise alone; fewer timesteps want a larger --beta-end, or squaredcos_cap_v2"
    ]
