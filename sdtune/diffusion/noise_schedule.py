"""The noise schedule of a model of pixels, as the diffusers scheduler that is saved beside it."""

from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler

from sdtune.config.sections import UserError

FROM_SCRATCH = {
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


def noise_scheduler(cfg: Any, base: Mapping[str, Any] | None = None) -> DDPMScheduler:
    """The forward process that ``cfg`` asks for, where it says nothing that of ``base``, else of the paper.

    Args:
        cfg: a config with the section Schedule and ``rescale_betas_zero_snr``, perhaps ``prediction_type``,
            ``variance_type`` and ``out_of_range``.
        base: ``scheduler_config.json`` of the model that is continued.

    Raises:
        UserError: betas that do not grow; a zero terminal SNR with a network that regresses the noise.
    """
    asked = {name: value for name in FROM_SCRATCH if (value := getattr(cfg, name, None)) is not None}
    if out_of_range := getattr(cfg, "out_of_range", None):
        asked["clip_sample"] = out_of_range == "clip"
    if cfg.rescale_betas_zero_snr:
        asked |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    chosen = FROM_SCRATCH | dict(base or {}) | asked
    if chosen["beta_start"] >= chosen["beta_end"]:
        raise UserError(f"--beta-start {chosen['beta_start']:g} is not below --beta-end {chosen['beta_end']:g}")
    regresses_noise = hasattr(cfg, "prediction_type") and chosen["prediction_type"] == "epsilon"
    if chosen.get("rescale_betas_zero_snr") and regresses_noise:
        raise UserError(
            "--rescale-betas-zero-snr: pure noise says nothing of the image; add --prediction-type v_prediction"
        )
    return DDPMScheduler.from_config(chosen)


def describe(scheduler: DDPMScheduler) -> list[str]:
    """What a person should know of a schedule before training, one line each."""
    left = scheduler.alphas_cumprod[-1].item()
    if left < 0.01:
        return []
    return [
        f"the last of {len(scheduler.alphas_cumprod)} timesteps still holds {left:.0%} of an image's variance, while "
        "sampling starts from noise alone; fewer timesteps want a larger --beta-end, or squaredcos_cap_v2"
    ]
