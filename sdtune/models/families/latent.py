"""What text-to-image bases on latents share: their parts, their text, their latents, their pipelines.

A family names the part that denoises and its text encoders, says how the denoiser is called and which forward process
it was made with. Parts are read as ``model_index.json`` names them. Captions are templated, cut into tokens and encoded
by the stock pipeline's own ``encode_prompt``.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional

from sdtune.config.fields import flag
from sdtune.config.sections import BaseOptions, Denoising, UserError
from sdtune.data.cache import weights_digest
from sdtune.diffusion.objective import Objective
from sdtune.models.families.parts import ModelParts, named, tokenizer_of

DDPM_ONLY = frozenset(
    "prediction_type rescale_betas_zero_snr snr_gamma timestep_bias_strategy timestep_bias_multiplier "
    "timestep_bias_begin timestep_bias_end timestep_bias_portion".split()
)
FLOW_ONLY = frozenset("weighting_scheme logit_mean logit_std mode_scale timestep_shift resolution_shift".split())
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Modules of a text encoder that get an adapter."""


class LatentFamily(ModelParts):
    """A base model.

    Args:
        cfg: a config with the sections Model, Denoising and BaseOptions; the others are those of ``ModelParts``.
    """

    optional_encoders: ClassVar[tuple[str, ...]] = ()
    """Encoders that a base may lack."""
    trainable_encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that ``--train-text-encoder`` trains."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Default of ``--target-modules``: ends of names, or one regular expression."""
    options: ClassVar[frozenset[str]] = FLOW_ONLY
    """Those of `DDPM_ONLY` and of the section BaseOptions that mean something for this family."""
    patch: ClassVar[int] = 2
    """Sides of a latent are multiples of this."""
    native_resolution: ClassVar[int] = 1024
    """Side in pixels that the base was made for, where its configuration does not say."""
    max_tokens: ClassVar[int | None] = None
    """``max_sequence_length`` of the stock call; ``None`` for pipelines without one."""
    encode_options: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}
    """Arguments of ``encode_prompt`` that leave the negative prompt out."""
    prompt_arguments: ClassVar[tuple[str, ...]] = ("prompt",)
    """Arguments of ``encode_prompt`` that take the captions."""
    conditions_on_size: ClassVar[bool] = False
    """Whether the denoiser is told the sizes of the image and of its crop, as ``size`` of a batch."""

    def __init__(self, cfg: Any, source: str, index: Mapping[str, Any], device: torch.device, dtype: torch.dtype):
        absent = [name for name in self.optional_encoders if not (named(index, name) and self.wants(name, cfg))]
        self.encoders = tuple(name for name in self.encoders if name not in absent)
        super().__init__(cfg, source, index, device, dtype)
        self.refuse_options()
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

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        """Names what ``encode_prompt`` returned, each ``[B, ...]``; ``mask`` bool ``[B, L]`` where lengths differ."""
        raise NotImplementedError

    def text_shapes(self, captions: int) -> dict[str, Tensor] | None:
        """What ``encode`` gives, as shapes without values; ``None`` where the encoders can be traced without values."""
        return None

    def predict(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """What the denoiser says at ``x_t`` ``[B, C, h, w]``, ``t`` ``[B]``."""
        raise NotImplementedError

    @classmethod
    def guidance(cls, scale: float, negative: str) -> dict[str, Any]:
        """The stock call's arguments for ``pred = negative + scale (positive - negative)``; scale 1 is no guidance.

        ``None`` and not "" stands for no negative prompt: SDXL takes zeros for it, and so do its users.
        """
        return {"guidance_scale": scale, "negative_prompt": negative or None}

    def unused_layers(self, part: str) -> str | None:
        """Regular expression on the beginning of names of layers whose output is never read.

        They do not train: no gradient reaches them, and processes that train together would wait for one.
        """
        return None

    # ---- parts -----------------------------------------------------------------------------------------

    def refuse_options(self) -> None:
        """Raises: UserError for options that are given and mean nothing for this base."""
        for name in sorted({*DDPM_ONLY, *BaseOptions.model_fields} - self.options):
            section = Denoising if name in DDPM_ONLY else BaseOptions
            if getattr(self.cfg, name) != section.model_fields[name].get_default():
                kind = self.pipeline_class.__name__
                raise UserError(f"{flag(name)}: has no meaning for a {kind}, which {self.cfg.model} is; leave it out")

    @property
    def has_values(self) -> bool:
        """False where memory is estimated: the parts are shapes without values."""
        weight = next(self.denoiser.parameters())
        return weight.device.type != "meta" and not isinstance(weight, FakeTensor)

    # ---- images ----------------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        return self.vae_config["latent_channels"]

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
        return side * self.downscale if side else self.native_resolution

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the VAE's posterior, ``[B, 2C, h, w]`` in fp32, of pixels in [-1, 1]."""
        return self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.parameters.float()

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

    # ---- text ------------------------------------------------------------------------------------------

    @property
    def sequence_length(self) -> int | None:
        """``max_sequence_length`` of the stock call, which ``--max-sequence-length`` changes."""
        return self.cfg.max_sequence_length or self.max_tokens

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser is told of captions, by name, each ``[B, ...]``."""
        if not self.has_values and (shapes := self.text_shapes(len(captions))):
            return shapes
        parts = dict.fromkeys(("vae", "scheduler")) | {self.denoiser_name: self.denoiser}
        length = {"max_sequence_length": self.sequence_length} if self.sequence_length else {}
        prompts = {name: list(captions) for name in self.prompt_arguments}
        pipe = self.pipeline(**parts)
        return self.text_tensors(pipe.encode_prompt(**prompts, device=self.device, **self.encode_options, **length))

    def conditioning(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the denoiser is told: cached text, or that of the captions, and the size where it is asked for."""
        cached = {name.removeprefix("text."): x for name, x in batch.items() if name.startswith("text.")}
        size = {"size": batch["size"]} if self.conditions_on_size else {}
        return (cached or self.encode(batch["caption"])) | size

    def text_key(self) -> str:
        """Names all that ``encode`` depends on but the caption."""
        versions = f"{diffusers.__version__} {transformers.__version__}"
        sha = hashlib.sha256(f"{self.pipeline_class.__name__} {versions} {self.sequence_length}".encode())
        for name, tokenizer in sorted(self.tokenizers.items()):
            sha.update(f"{name} {tokenizer.backend_tokenizer.to_str()} {tokenizer.chat_template}".encode())
        for name in self.encoders:
            sha.update(weights_digest(self.part(name)).encode())
        return sha.hexdigest()[:24]

    @property
    def caption_window(self) -> int:
        """The most tokens of a caption that are read, marks of begin and end included."""
        return self.sequence_length or self.tokenizer.model_max_length

    def count_tokens(self, caption: str) -> int:
        """Length of a caption in the tokens of the last text encoder, marks of begin and end included."""
        tokenizer = self.tokenizers[tokenizer_of(self.encoders[-1])]
        words = diffusers.loaders.TextualInversionLoaderMixin().maybe_convert_prompt(caption, tokenizer)
        return len(tokenizer(words, truncation=False, verbose=False).input_ids)

    # ---- what trains -----------------------------------------------------------------------------------

    def word_encoder(self) -> str:
        """The text encoder that learns the vectors of a new word.

        Raises: UserError for a base in which a word would have to be learnt in several, or in a language model.
        """
        if len(self.encoders) > 1 or "text_encoder" not in self.trainable_encoders:
            raise UserError(
                f"--placeholder-token: a {self.pipeline_class.__name__} learns no new word here, only Stable Diffusion "
                "1 and 2 do; use sdtune lora, or dreambooth --lora with --instance-prompt"
            )
        return self.encoders[0]

    def encoders_to_train(self) -> tuple[str, ...]:
        """Raises: UserError for a base whose text encoders are not trained."""
        if not self.trainable_encoders:
            raise UserError(
                f"--train-text-encoder: the text encoder of a {self.pipeline_class.__name__} is a language model that "
                "adapters for it leave alone; leave it out"
            )
        return self.trainable_encoders

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


def pack(z: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` as tokens ``[B, (h/2)(w/2), 4C]``, one for each patch of 2 x 2."""
    return functional.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """The latents of tokens, shaped like ``like`` ``[B, C, h, w]``."""
    height, width = like.shape[-2:]
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def unpad(embeds: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows of ``embeds`` ``[B, L, D]`` that ``mask`` ``[B, L]`` marks, a tensor for each caption."""
    return [e[m] for e, m in zip(embeds, mask.bool(), strict=True)]


def pad(embeds: Iterable[Tensor]) -> dict[str, Tensor]:
    """Embeddings of captions of differing lengths as one tensor ``[B, L, D]``, and the mask ``[B, L]`` of it."""
    rows = list(embeds)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return {"embeds": padded, "mask": torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]}
