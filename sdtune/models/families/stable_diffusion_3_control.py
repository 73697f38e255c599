"""ControlNets of Stable Diffusion 3: copies of its first blocks, which follow the latents of an image."""

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.families.transformer_control import TransformerControl, check_layers, copied_blocks


class StableDiffusion3Control(TransformerControl):
    control_pipelines: ClassVar[dict[str, Any]] = {"controlnet": StableDiffusion3ControlNetPipeline}
    controlnet_class: ClassVar[str] = "SD3ControlNetModel"

    def new_controlnet(self, layers: int | None = None, single_layers: int | None = None) -> SD3ControlNetModel:
        """Half of the blocks, as diffusers takes 12 of the 24 of Stable Diffusion 3 medium."""
        if single_layers is not None:
            raise UserError("--num-single-layers: Stable Diffusion 3 has no single blocks; leave it out")
        blocks = self.denoiser.config.num_layers
        layers = layers or max(1, blocks // 2)
        # The last block gives the image nothing that a ControlNet is added to
        read = len({int(k / (blocks / layers)) for k in range(blocks - 1)})
        check_layers("--num-layers", layers, blocks, read)
        # As the stock pipeline reads it: the pooled text, and latents with the VAE's shift, as it was trained with
        changes = {"num_layers": layers, "extra_conditioning_channels": 0, "force_zeros_for_pooled_projection": False}
        return copied_blocks(SD3ControlNetModel, self.denoiser, changes)

    def control(
        self, controlnet: Any, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], image: Tensor
    ) -> dict[str, Any]:
        """What a ControlNet adds to the denoiser, as further arguments of ``predict``.

        Args:
            image: as `source_latents` takes it.
        """
        latents = self.normalise(self.source_latents(image)).to(self.dtype)
        added = controlnet(**self.inputs(x_t, t, cond), controlnet_cond=latents, return_dict=False)[0]
        return {"block_controlnet_hidden_states": added}
