"""FLUX.2 dev (2025): Mistral 3 read at three depths; latents in 2 x 2 patches under the VAE's batch-norm statistics."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import Flux2Pipeline
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import AutoTokenizer

from sdtune.config.sections import UserError
from sdtune.diffusion.objective import Objective
from sdtune.diffusion.rectified_flow import RectifiedFlow
from sdtune.models.families.latent import FLOW_ONLY, LatentFamily, made_on, pack, unpack

# attn.to_out is a layer in the single blocks, a list of layers in the double ones
TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out"


class Flux2(LatentFamily):
    pipeline_class: ClassVar[Any] = Flux2Pipeline
    lora_targets: ClassVar[tuple[str, ...]] = (TARGETS,)
    options: ClassVar[frozenset[str]] = FLOW_ONLY | {"guidance_embedding", "max_sequence_length"}
    max_tokens: ClassVar[int | None] = 512
    encode_options: ClassVar[dict[str, Any]] = {}
    _statistics: tuple[Tensor, Tensor] | None = None

    @classmethod
    def reader(cls, part: str, kind: type) -> Any:
        """Of a processor of text and pictures the tokenizer alone, which needs no torchvision."""
        return AutoTokenizer if part.startswith("tokenizer") and kind.__name__.endswith("Processor") else kind

    def make_objective(self) -> Objective:
        return RectifiedFlow.of(self.cfg, self.cfg, self.scheduler, "uniform", self.patch)

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        return {"embeds": encoded[0]}

    def text_shapes(self, captions: int) -> dict[str, Tensor]:
        width = self.text_encoder.config.get_text_config().hidden_size
        shape = (captions, self.sequence_length, 3 * width)  # the states of three layers side by side
        return {"embeds": torch.empty(shape, device=self.denoiser.device, dtype=self.dtype)}

    def normalise(self, z: Tensor) -> Tensor:
        mean, std = (figure.to(z) for figure in self.patch_statistics())
        return pixel_shuffle((pixel_unshuffle(z, 2) - mean) / std, 2)

    def patch_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each element of a patch, ``[4C, 1, 1]``; they stay when the VAE is unloaded."""
        if not self.has_values:
            return (torch.empty(4 * self.latent_channels, 1, 1, device=self.denoiser.device),) * 2
        if not self._statistics:
            norm, epsilon = self.vae.bn, self.vae_config["batch_norm_eps"]
            self._statistics = norm.running_mean[:, None, None], (norm.running_var + epsilon).sqrt()[:, None, None]
        return self._statistics

    def unload_frozen(self) -> None:
        if "vae" in self.parts and self.has_values:
            self.patch_statistics()
        super().unload_frozen()

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        x_t, embeds = x_t.to(self.dtype), cond["embeds"].to(self.dtype)
        tokens = self.denoiser(
            hidden_states=pack(x_t),
            timestep=t,
            encoder_hidden_states=embeds,
            txt_ids=made_on(x_t.device, self.pipeline_class._prepare_text_ids, embeds),
            img_ids=made_on(x_t.device, self.pipeline_class._prepare_latent_ids, pixel_unshuffle(x_t, 2)),
            guidance=self.guidance_input(x_t),
            return_dict=False,
        )[0]
        return unpack(tokens, x_t)

    @classmethod
    def guidance(cls, scale: float, negative: str) -> dict[str, Any]:
        if negative:
            raise UserError("--negative-prompt: a FLUX.2 pipeline takes none; leave it out")
        return {"guidance_scale": scale}
