"""Stable Diffusion 1 and 2 (Rombach et al. 2022): a VAE, one CLIP text encoder and a UNet on 4-channel latents."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.diffusion.objective import DDPM, Objective
from sdtune.models.families.latent import DDPM_ONLY, LatentFamily

CONDITION_WIDTHS = (16, 32, 96, 256)
"""Channels through which a ControlNet brings its image to the size of a latent (Zhang et al. 2023, section 3.2)."""


class StableDiffusion(LatentFamily):
    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    control_pipelines: ClassVar[dict[str, Any]] = {
        "controlnet": StableDiffusionControlNetPipeline,
        "adapter": StableDiffusionAdapterPipeline,
    }
    edit_pipeline: ClassVar[Any] = StableDiffusionInstructPix2PixPipeline
    denoiser_name = "unet"
    trainable_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    word_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    options: ClassVar[frozenset[str]] = DDPM_ONLY
    patch = 1
    clip_layer: ClassVar[int | None] = 1
    reads_windows = True
    encode_options: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}

    def check(self) -> None:
        takes, gives = self.denoiser.config.in_channels, self.latent_channels
        if takes != gives:
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

    def inputs(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the denoiser, and of networks made from it."""
        return {"sample": x_t.to(self.dtype), "timestep": t, "encoder_hidden_states": cond["embeds"].to(self.dtype)}

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], **more: Any) -> Tensor:
        return self.denoiser(**self.inputs(x_t, t, cond), encoder_attention_mask=cond.get("mask"), **more).sample

    # ---- networks that follow an image -----------------------------------------------------------------

    def new_controlnet(self) -> ControlNetModel:
        """A ControlNet with the weights of the denoiser's encoder; on the meta device its shapes alone."""
        unet, halvings = self.denoiser, self.downscale.bit_length() - 1
        # The image is halved from each of these widths to the next, until it has the size of a latent
        widths = (*CONDITION_WIDTHS[: min(halvings, 3)], *CONDITION_WIDTHS[3:] * max(1, halvings - 2))
        size = {"conditioning_embedding_out_channels": widths}
        with unet.device:
            return ControlNetModel.from_unet(unet, load_weights_from_unet=unet.device.type != "meta", **size)

    def new_t2i_adapter(self, num_res_blocks: int) -> T2IAdapter:
        """A T2I-Adapter whose features have the sizes of the denoiser's."""
        widths = list(self.denoiser.config.block_out_channels)
        with self.device:
            return T2IAdapter(3, widths, num_res_blocks, self.downscale, "full_adapter")

    def control(
        self, controlnet: Any, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], image: Tensor
    ) -> dict[str, Any]:
        """What a ControlNet adds to the denoiser, as further arguments of ``predict``.

        Args:
            image: ``[B, 3, H, W]`` in [-1, 1].
        """
        shown = (image / 2 + 0.5).to(self.dtype)
        down, middle = controlnet(**self.inputs(x_t, t, cond), controlnet_cond=shown, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    @cached_property
    def scheduler(self) -> Any:
        kind, changed = self.part_class("scheduler"), {}
        if self.cfg.prediction_type:
            changed["prediction_type"] = self.cfg.prediction_type
        if self.cfg.rescale_betas_zero_snr:  # most schedulers cannot; sampling must start at the last timestep
            kind, changed = DDIMScheduler, changed | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return kind.from_config(self._read(kind, "scheduler").config, **changed)
