"""What bases whose denoiser is a UNet share: how it is called, and the networks beside it that follow an image."""

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import ControlNetModel, T2IAdapter
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.families.latent import LatentFamily

CONDITION_WIDTHS = (16, 32, 96, 256)
"""Channels through which a ControlNet brings its image to the size of a latent (Zhang et al. 2023, section 3.2)."""


class UNetFamily(LatentFamily):
    denoiser_name = "unet"
    patch = 1
    reads_text_by_cross_attention: ClassVar[bool] = True

    def inputs(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the denoiser, and of networks made from it."""
        return {"sample": x_t.to(self.dtype), "timestep": t, "encoder_hidden_states": cond["embeds"].to(self.dtype)}

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], **more: Any) -> Tensor:
        return self.denoiser(**self.inputs(x_t, t, cond), encoder_attention_mask=cond.get("mask"), **more).sample

    # ---- networks that follow an image -----------------------------------------------------------------

    def new_controlnet(self, layers: int | None = None, single_layers: int | None = None) -> ControlNetModel:
        """A ControlNet with the weights of the denoiser's encoder, which is copied whole."""
        if "controlnet" not in self.control_pipelines:
            raise self.lacks("ControlNet")
        if layers is not None or single_layers is not None:
            raise UserError("--num-layers, --num-single-layers: the encoder of a UNet is copied whole; leave them out")
        unet, halvings = self.denoiser, self.downscale.bit_length() - 1
        # The image is halved from each of these widths to the next, until it has the size of a latent
        widths = (*CONDITION_WIDTHS[: min(halvings, 3)], *CONDITION_WIDTHS[3:] * max(1, halvings - 2))
        size = {"conditioning_embedding_out_channels": widths}
        with unet.device:
            return ControlNetModel.from_unet(unet, load_weights_from_unet=unet.device.type != "meta", **size)

    def new_t2i_adapter(self, num_res_blocks: int) -> T2IAdapter:
        """A T2I-Adapter whose features have the sizes of the denoiser's."""
        if "adapter" not in self.control_pipelines:
            raise self.lacks("T2I-Adapter")
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
