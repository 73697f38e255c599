"""What text-to-image bases on latents share: their parts, their text, their latents, their pipelines.

A family names the part that denoises and its text encoders, says how the denoiser is called and which forward process
it was made with. Parts are read as ``model_index.json`` names them.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sdtune.config.fields import flag
from sdtune.config.sections import BaseOptions, Denoising, TextEncoding, UserError
from sdtune.diffusion.objective import Objective
from sdtune.models.families.parts import named
from sdtune.models.families.text import TextFamily

DDPM_ONLY = frozenset(
    "prediction_type rescale_betas_zero_snr snr_gamma timestep_bias_strategy timestep_bias_multiplier "
    "timestep_bias_begin timestep_bias_end timestep_bias_portion".split()
)
FLOW_ONLY = frozenset("weighting_scheme logit_mean logit_std mode_scale timestep_shift resolution_shift".split())
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Modules of a text encoder that get an adapter."""


class LatentFamily(TextFamily):
    """A base model.

    Args:
        cfg: a config with the sections Model, Denoising and BaseOptions; the others are those of ``TextFamily``.
    """

    optional_encoders: ClassVar[tuple[str, ...]] = ()
    """Encoders that a base may lack."""
    trainable_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that ``--train-text-encoder`` trains."""
    word_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that learn the vectors of a new word, each its own."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Default of ``--target-modules``: ends of names, or one regular expression."""
    options: ClassVar[frozenset[str]] = FLOW_ONLY
    """Those of `DDPM_ONLY` and of BaseOptions' own that mean something for this family."""
    patch: ClassVar[int] = 2
    """Sides of a latent are multiples of this."""
    native_resolution: ClassVar[int] = 1024
    """Side in pixels that the base was made for, where its configuration does not say."""
    reads_text_by_cross_attention: ClassVar[bool] = False
    """Whether the denoiser is a UNet whose layers ``attn2`` read the text, and nothing else does."""
    paints_holes: ClassVar[bool] = False
    """Whether the denoiser is told a hole, and what is around it, as ``hole`` and ``kept`` of a batch."""
    enlarges: ClassVar[bool] = False
    """Whether the denoiser enlarges a small picture, ``small`` of a batch; ``small_noise`` and ``small_u`` noise it."""
    conditions_on_size: ClassVar[bool] = False
    """Whether the denoiser is told the sizes of the image and of its crop, as ``size`` of a batch."""

    def __init__(self, cfg: Any, source: str, index: Mapping[str, Any], device: torch.device, dtype: torch.dtype):
        absent = [name for name in self.optional_encoders if not (named(index, name) and self.wants(name, cfg))]
        self.encoders = tuple(name for name in self.encoders if name not in absent)
        super().__init__(cfg, source, index, device, dtype)
        self.refuse_options()
        self.check_reading(cfg, self.pipeline_class.__name__)
        self.check()
        self.objective = self.make_objective()

    # ---- what a family says ----------------------------------------------------------------------------

    def check(self) -> None:
        """Raises: UserError for a base of the right class that is no text-to-image model."""

    def wants(self, encoder: str, cfg: Any) -> bool:
        """Whether the options leave an optional encoder in."""
        return True

    def make_objective(self) -> Objective:
        raise NotImplementedError

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], **more: Any) -> Tensor:
        """What the denoiser says at ``x_t`` ``[B, C, h, w]``, ``t`` ``[B]``.

        Args:
            more: further arguments of the denoiser; families of a UNet take them.
        """
        raise NotImplementedError

    @classmethod
    def guidance(cls, scale: float, negative: str) -> dict[str, Any]:
        """The stock call's arguments for ``pred = negative + scale (positive - negative)``; scale 1 is no guidance.

        ``None`` and not "" stands for no negative prompt: SDXL takes zeros for it, and so do its users.
        """
        return {"guidance_scale": scale, "negative_prompt": negative or None}

    @classmethod
    def picture_size(cls, pipe: Any, width: int | None, height: int | None) -> dict[str, Any]:
        """The arguments of ``pipe`` for an image of this size; ``None`` twice is the base's own."""
        side = cls.own_side(pipe) if width is None else None
        return {"width": width or side, "height": height or side}

    def guidance_input(self, x_t: Tensor) -> Tensor | None:
        """The guidance that a guidance-distilled denoiser is told in training, ``[B]``; ``None`` for another."""
        if not self.denoiser.config.get("guidance_embeds"):
            return None
        return torch.full((len(x_t),), self.cfg.guidance_embedding, device=x_t.device)

    @classmethod
    def own_side(cls, pipe: Any) -> int | None:
        """Side in pixels of what a pipeline draws when no size is asked for; ``None`` where the stock call knows it.

        A denoiser that does not say its size gets 1024 from the stock call, whatever size its VAE was made for.
        """
        denoiser = pipe.components.get(cls.denoiser_name)
        if denoiser is None or denoiser.config.get("sample_size"):
            return None
        return stated_size(pipe.vae.config)

    def unused_layers(self, part: str) -> str | None:
        """Regular expression on the beginning of names of layers whose output is never read.

        They do not train: no gradient reaches them, and processes that train together would wait for one.
        """
        return None

    # ---- parts -----------------------------------------------------------------------------------------

    def refuse_options(self) -> None:
        """Raises: UserError for options that are given and mean nothing for this base."""
        of_bases = {*DDPM_ONLY, *BaseOptions.model_fields} - TextEncoding.model_fields.keys()
        for name in sorted(of_bases - self.options):
            section = Denoising if name in DDPM_ONLY else BaseOptions
            if getattr(self.cfg, name) != section.model_fields[name].get_default():
                kind = self.pipeline_class.__name__
                raise UserError(f"{flag(name)}: has no meaning for a {kind}, which {self.cfg.model} is; leave it out")

    # ---- images ----------------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        return self.vae_config["latent_channels"]

    @property
    def input_channels(self) -> int:
        """Channels that the denoiser takes."""
        return self.latent_channels

    @property
    def downscale(self) -> int:
        """Pixels of an image per element of a latent, along a side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """Sides of an image in pixels are multiples of this."""
        return self.downscale * self.patch

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the base was made for."""
        side = self.denoiser.config.get("sample_size")
        return side * self.downscale if side else stated_size(self.vae_config) or self.native_resolution

    of_videos: ClassVar[bool] = False
    """Whether the VAE is one of videos, of which an image is one frame."""

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the VAE's posterior, ``[B, 2C, h, w]`` in fp32, of pixels in [-1, 1]."""
        pixels = pixels.to(self.device, self.vae.dtype)
        found: Tensor = self.vae.encode(pixels.unsqueeze(2) if self.of_videos else pixels).latent_dist.parameters
        return (found.squeeze(2) if self.of_videos else found).float()

    def decode(self, z: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` of the VAE's own latents ``[B, C, h, w]``, which are not normalised."""
        z = z.to(self.vae.dtype)
        pixels: Tensor = self.vae.decode(z.unsqueeze(2) if self.of_videos else z).sample
        return pixels.squeeze(2) if self.of_videos else pixels

    def latents(self, batch: Mapping[str, Tensor]) -> Tensor:
        """A sample of each image's posterior, normalised: ``[B, C, h, w]`` in fp32."""
        moments = batch["moments"] if "moments" in batch else self.moments(batch["pixels"])
        mean, logvar = moments.float().chunk(2, dim=1)
        std = (0.5 * logvar.clamp(-30, 20)).exp()
        return self.normalise(mean + std * batch["posterior_noise"])

    def normalise(self, z: Tensor) -> Tensor:
        """The VAE's latents, about zero and of about unit variance."""
        shift = self.vae_config.get("shift_factor")
        return (z - shift if shift else z) * self.vae_config["scaling_factor"]

    # ---- networks that follow an image -----------------------------------------------------------------

    control_pipelines: ClassVar[Mapping[str, Any]] = {}
    """The stock pipelines that follow an image, by the part that does it: ``controlnet`` or ``adapter``."""
    controlnet_class: ClassVar[str] = "ControlNetModel"
    """Class of diffusers of a ControlNet for this base."""
    control_of_latents: ClassVar[bool] = False
    """Whether a ControlNet follows the latents of an image, and not its pixels."""
    edit_pipeline: ClassVar[Any] = None
    """The stock pipeline that edits an image, if there is one."""

    def lacks(self, what: str, others: str = "Stable Diffusion 1 and 2 and SDXL") -> UserError:
        """What to raise for a base for which there is no such network; ``others`` are those for which there is."""
        kind = self.pipeline_class.__name__
        return UserError(f"--model {self.cfg.model}: a {kind} gets no {what} here; {others} do")

    def new_controlnet(self, layers: int | None = None, single_layers: int | None = None) -> Any:
        """A ControlNet with weights of the denoiser; on the meta device its shapes alone.

        Args:
            layers, single_layers: blocks of a transformer that are copied; ``None`` for the family's own choice.

        Raises: UserError for a base that has none, or not so many blocks.
        """
        raise self.lacks("ControlNet", "Stable Diffusion 1 to 3.5, SDXL and FLUX.1")

    def unread_layers(self, controlnet: Any) -> str | None:
        """Regular expression on the beginning of names of layers of a ControlNet whose output is never read."""
        return None

    def new_t2i_adapter(self, num_res_blocks: int) -> Any:
        """Raises: UserError for a base that has none."""
        raise self.lacks("T2I-Adapter")

    def source_latents(self, image: Tensor) -> Tensor:
        """The mean of the VAE's posterior of an image to edit, not normalised: ``[B, C, h, w]`` in fp32.

        Args:
            image: its moments ``[B, 2C, h, w]``, or its pixels ``[B, 3, H, W]`` in [-1, 1].
        """
        moments = image if image.shape[1] == 2 * self.latent_channels else self.moments(image)
        return moments.float().chunk(2, dim=1)[0]

    # ---- what trains -----------------------------------------------------------------------------------

    def encoders_for_a_word(self) -> tuple[str, ...]:
        """The text encoders that learn a new word.

        Raises: UserError for a base that no reader of embeddings teaches a word.
        """
        if not self.word_encoders:
            raise UserError(
                f"--placeholder-token: a {self.pipeline_class.__name__} learns no new word here, only Stable Diffusion "
                "1, 2 and XL do; use sdtune lora, or dreambooth --lora with --instance-prompt"
            )
        return tuple(name for name in self.word_encoders if name in self.encoders)

    def encoders_to_train(self) -> tuple[str, ...]:
        """Raises: UserError for a base whose text encoders are not trained."""
        if not self.trainable_encoders:
            raise UserError(
                f"--train-text-encoder: the text encoder of a {self.pipeline_class.__name__} is a language model that "
                "adapters for it leave alone; leave it out"
            )
        return tuple(name for name in self.trainable_encoders if name in self.encoders)

    def adapted_modules(self, part: str, asked: list[str]) -> list[str]:
        """Modules of a part that get an adapter: ends of names, or one regular expression.

        Args:
            asked: what the options say of the denoiser; nothing for the base's own.
        """
        names = list(TEXT_TARGETS) if part != self.denoiser_name else asked or list(self.lora_targets)
        if not (unused := self.unused_layers(part)):
            return names
        if len(names) > 1 or re.fullmatch(r"[\w.]+", names[0]):
            names = [rf"(.*\.)?({'|'.join(map(re.escape, names))})"]
        return [f"(?!{unused})({names[0]})"]


def stated_size(config: Mapping[str, Any]) -> int | None:
    """Side in pixels of the images that a VAE was made for, where its configuration says it and not diffusers."""
    return None if "sample_size" in config.get("_use_default_values", ()) else config.get("sample_size")


def pack(z: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` as tokens ``[B, (h/2)(w/2), 4C]``, one for each patch of 2 x 2."""
    return functional.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """The latents of tokens, shaped like ``like`` ``[B, C, h, w]``."""
    height, width = like.shape[-2:]
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def made_on(device: torch.device, make: Callable[..., Tensor], *given: Any) -> Tensor:
    """What ``make`` gives, made on ``device`` itself: a copy from main memory would have the host wait for it."""
    with device:
        return make(*given)
