"""What a captioned image is to a recipe: position in the run -> tensors, with the noise that belongs to it.

Everything random about sample ``p`` is drawn here, on the CPU, in the loader's workers, from
``(seed, purpose, p)``: which process, worker or batch it ends in changes nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.data import Stream, Streamed, cache, report
from sdtune.data.encoded_shards import Encoded, encode_shards
from sdtune.data.noised import Noised


def new_words(tokenizer: Any) -> list[str]:
    """Words that were added to a tokenizer, without its marks of begin and end."""
    return [word for word in tokenizer.added_tokens_encoder if word not in tokenizer.all_special_tokens]


class Tokens:
    """Captions to token ids ``[L]``, padded and cut to the model's window; a learnt word becomes its tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.words = TextualInversionLoaderMixin() if new_words(tokenizer) else None

    @property
    def window(self) -> int:
        return self.tokenizer.model_max_length

    def __call__(self, caption: str) -> Tensor:
        given = self.tokenizer(
            self.spelt(caption), padding="max_length", max_length=self.window, truncation=True, return_tensors="pt"
        )
        return given.input_ids[0]

    def count(self, caption: str) -> int:
        return len(self.tokenizer(self.spelt(caption), truncation=False, verbose=False).input_ids)

    def spelt(self, caption: str) -> str:
        """``<cat>`` as ``<cat> <cat>_1 ...``, by the function that spells the prompts of a pipeline."""
        return self.words.maybe_convert_prompt(caption, self.tokenizer) if self.words else caption


class TextToImage(Noised):
    """Captioned images by position, or by ``("holdout", k)``: the k-th pair of held-out image and quantile.

    Args:
        cfg: a config with the sections Data, Captions, Denoising and Prompts.
        latent: (channels of a latent, pixels per element of it along a side).
        moments, texts: cached VAE moments by pixel key and text embeddings by caption, or ``None`` to give
            pixels ``[3, H, W]`` and token ids ``[L]`` instead.
    """

    def __init__(
        self,
        cfg: Any,
        stream: Stream,
        tokens: Tokens,
        latent: tuple[int, int],
        moments: Mapping[str, Tensor] | Encoded | None = None,
        texts: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(cfg, stream)
        self.tokens, self.latent = tokens, latent
        self.moments, self.texts = moments, texts

    @property
    def prompts(self) -> list[str]:
        """What the sample grids show; never empty."""
        return self.cfg.validation_prompt or [text for text in self.stream.texts() if text] or [""]

    def tensors(self, sample: Any, u: Tensor, position: Any) -> dict[str, Any]:
        channels, downscale = self.latent
        shape = (channels, sample.height // downscale, sample.width // downscale)
        noise = self.noise(position, *shape)
        item: dict[str, Any] = {"name": sample.name, "part": sample.part, "u": u, **noise}
        item["posterior_noise"] = self.normal("posterior", position, *shape)
        if self.moments is None:
            item["pixels"] = self.stream.pixels(sample)
        else:
            item["moments"] = self.moments[self.stream.pixel_key(sample)]
        if self.texts is None:
            item["tokens"] = self.tokens(sample.caption)
        else:
            item["text"] = self.texts[text_key(self.tokens(sample.caption))]
        return item


def text_key(tokens: Tensor) -> str:
    return cache.digest(tokens.tolist())


def text_to_image(
    cfg: Any, family: Any, stream: Stream, log: Callable[[str], None], trains_text: bool = False
) -> TextToImage:
    """The dataset of a text-to-image recipe, with everything cached that is the same at each visit.

    Args:
        trains_text: the text encoder is trained, so that its output cannot be kept.
    """
    for option, pixels in {"resolution": cfg.resolution, "bucket_step": cfg.bucket_step}.items():
        if pixels % family.downscale and (option == "resolution" or cfg.buckets):
            raise UserError(f"--{option.replace('_', '-')} {pixels}: this base wants a multiple of {family.downscale}")
    if cfg.resolution > 2 * family.resolution:
        native = f"this base was made for {family.resolution} pixels"
        log(f"{native}; --resolution {cfg.resolution} is far from that")
    tokens = Tokens(family.tokenizer)
    if isinstance(stream, Streamed):
        return streamed(cfg, family, stream, tokens, log)
    for line in report(stream, tokens.count, tokens.window):
        log(line)
    moments = texts = None
    if cfg.cache and (reason := stream.pixels_cacheable):
        log(f"VAE moments are not cached: {reason}")
    elif cfg.cache:
        variants = {stream.pixel_key(s): s for s in stream.pixel_variants()}

        @torch.no_grad()
        def encode(key: str) -> Tensor:
            return family.moments(stream.pixels(variants[key])[None])[0]

        moments = cache.keep("moments", family.vae, variants, encode, "Encoding images")
    reason = "the text encoder is trained" if trains_text else stream.text_cacheable
    if cfg.cache and reason:
        log(f"text embeddings are not cached: {reason}")
    elif cfg.cache:
        captions = {text_key(ids): ids for ids in map(tokens, stream.texts())}

        @torch.no_grad()
        def embed(key: str) -> Tensor:
            return family.embed(captions[key][None])[0]

        texts = cache.keep("texts", family.text_encoder, captions, embed, "Encoding captions")
    if cfg.cache:
        family.unload_frozen()
    return TextToImage(cfg, stream, tokens, (family.latent_channels, family.downscale), moments, texts)


def streamed(cfg: Any, family: Any, stream: Streamed, tokens: Tokens, log: Callable[[str], None]) -> TextToImage:
    """The dataset over shards. Captions are encoded as they are shown; moments are kept with ``--shard-cache``."""
    for line in stream.told():
        log(line)
    latent = family.latent_channels, family.downscale
    if cfg.shard_cache is None:
        if cfg.cache:
            log("nothing is cached of a streamed dataset; --shard-cache FOLDER keeps its VAE moments")
        return TextToImage(cfg, stream, tokens, latent)
    if not cfg.center_crop:
        raise UserError("--shard-cache: random crops differ each time; --center-crop makes them alike, or leave it out")

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return family.moments(pixels)

    kept = encode_shards(cfg.shard_cache, stream, cache.weights_digest(family.vae), encode, family.vae.dtype)
    family.unload_frozen()
    return TextToImage(cfg, Streamed(cfg, kept, stream.group), tokens, latent, kept)
