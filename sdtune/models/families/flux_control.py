"""ControlNets of FLUX.1: copies of some of its first blocks of each kind, which follow the latents of an image."""

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import FluxControlNetModel, FluxControlNetPipeline
from torch import Tensor

from sdtune.config.fields import flag
from sdtune.models.families.latent import pack
from sdtune.models.families.transformer_control import TransformerControl, check_layers, copied_blocks


class FluxControl(TransformerControl):
    control_pipelines: ClassVar[dict[str, Any]] = {"controlnet": FluxControlNetPipeline}
    controlnet_class: ClassVar[str] = "FluxControlNetModel"

    def new_controlnet(self, layers: int | None = None, single_layers: int | None = None) -> FluxControlNetModel:
        """Four blocks of each kind, as in diffusers' script."""
        if not self.control_pipelines:
            return super().new_controlnet(layers, single_layers)
        config, found = self.denoiser.config, {}
        for name, asked in {"num_layers": layers, "num_single_layers": single_layers}.items():
            count = min(4, config[name]) if asked is None else asked
            if count:  # the base reads one for each few of its own blocks, rounded up
                check_layers(flag(name), count, config[name], -(-config[name] // -(-config[name] // count)))
            found[name] = count
        return copied_blocks(FluxControlNetModel, self.denoiser, found)

    def unread_layers(self, controlnet: Any) -> str | None:
        """Without single blocks, those of the last block; else the single ones read its text."""
        return None if controlnet.config.num_single_layers else super().unread_layers(controlnet)

    def control(
        self, controlnet: Any, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], image: Tensor
    ) -> dict[str, Any]:
        """What a ControlNet adds to the denoiser, as further arguments of ``predict``.

        Args:
            image: as `source_latents` takes it.
        """
        latents = pack(self.normalise(self.source_latents(image)).to(self.dtype))
        blocks, single = controlnet(**self.inputs(x_t, t, cond), controlnet_cond=latents, return_dict=False)
        return {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single}
