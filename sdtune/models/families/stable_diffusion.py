"""Stable Diffusion 1 and 2 (Rombach et al. 2022): a VAE, one CLIP text encoder and a UNet on 4-channel latents."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.diffusion.objective import DDPM, Objective
from sdtune.models.families.latent import DDPM_ONLY
from sdtune.models.families.unet import UNetFamily


class StableDiffusion(UNetFamily):
    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    control_pipelines: ClassVar[dict[str, Any]] = {
        "controlnet": StableDiffusionControlNetPipeline,
        "adapter": StableDiffusionAdapterPipeline,
    }
    edit_pipeline: ClassVar[Any] = StableDiffusionInstructPix2PixPipeline
    trainable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    word_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    options: ClassVar[frozenset[str]] = DDPM_ONLY
    clip_layer: ClassVar[int | None] = 1
    reads_windows = True
    encode_options: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}

    def check(self) -> None:
        takes, gives = self.denoiser.config.in_channels, self.latent_channels
        if takes != self.input_channels:
            raise UserError(
                f"--model {self.cfg.model}: its UNet takes {takes} channels, its VAE gives {gives}: an inpainting or "
                "editing model, not text-to-image"
            )
        if (sampler := self.index["scheduler"][1]).startswith("EDM"):
            raise UserError(
                f"--model {self.cfg.model}: its scheduler is {sampler}: EDM's preconditioning, as "
                "of Playground 2.5, is not here; choose another base"
            )

    def make_objective(self) -> Objective:
        cfg = self.cfg
        changed: dict[str, Any] = {}
        if cfg.rescale_betas_zero_snr:
            changed["rescale_betas_zero_snr"] = True
        if cfg.prediction_type:
            changed["prediction_type"] = cfg.prediction_type
        scheduler = DDPMScheduler.from_config(self._read(DDPMScheduler, "scheduler").config, **changed)
        if cfg.rescale_betas_zero_snr and scheduler.config.prediction_type == "epsilon":
            raise UserError("--rescale-betas-zero-snr: this base predicts epsilon; add --prediction-type v_prediction")
        return DDPM.of(cfg, scheduler)

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        return {"embeds": encoded[0]}

    @classmethod
    def window_tensors(cls, outputs: Sequence[Any]) -> dict[str, Tensor]:
        return {"embeds": outputs[0].last_hidden_state}

    @cached_property
    def scheduler(self) -> Any:
        kind, changed = self.part_class("scheduler"), {}
        if self.cfg.prediction_type:
            changed["prediction_type"] = self.cfg.prediction_type
        if self.cfg.rescale_betas_zero_snr:  # most schedulers cannot; sampling must start at the last timestep
            kind, changed = DDIMScheduler, changed | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return kind.from_config(self._read(kind, "scheduler").config, **changed)
