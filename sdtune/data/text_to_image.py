"""The training items of the text-to-image methods: position in the run -> image, caption and noise as tensors.

Everything random of position ``p`` is drawn here, on the CPU, in the loader's workers, from ``(seed, purpose, p)``. So
it does not depend on the process, worker or batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from torch import Tensor
from torch.nn import functional

from sdtune.config.sections import Latents, UserError
from sdtune.data import Sample, ShardStream, Stream, cache, summarize
from sdtune.data.denoising_dataset import DenoisingDataset, Position
from sdtune.data.encoded_shards import EncodedShards, encode_shards


def added_words(tokenizer: Any) -> list[str]:
    """Words that were added to a tokenizer, without its special tokens."""
    return [word for word in tokenizer.added_tokens_encoder if word not in tokenizer.all_special_tokens]


class CaptionTokenizer:
    """Caption -> token ids ``[L]``, padded or cut to the model's window. A learnt word is replaced by its tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.words = TextualInversionLoaderMixin() if added_words(tokenizer) else None

    @property
    def window(self) -> int:
        """Tokens that the text encoder reads, with the special ones."""
        return int(self.tokenizer.model_max_length)

    def __call__(self, caption: str) -> Tensor:
        given = self.tokenizer(
            self.expanded(caption), padding="max_length", max_length=self.window, truncation=True, return_tensors="pt"
        )
        ids: Tensor = given.input_ids[0]
        return ids

    def count(self, caption: str) -> int:
        """Length of a caption in tokens, with the special ones."""
        return len(self.tokenizer(self.expanded(caption), truncation=False, verbose=False).input_ids)

    def expanded(self, caption: str) -> str:
        """Replace ``<cat>`` by ``<cat> <cat>_1 ...``, with the function that does so for the prompts of a pipeline."""
        return str(self.words.maybe_convert_prompt(caption, self.tokenizer)) if self.words else caption


class TextToImageDataset(DenoisingDataset):
    """Captioned images.

    Args:
        latent: (channels of a latent, pixels per element of it along a side).
        prompts: of the sample grids; empty for the captions of the dataset.
        moments, texts: cached VAE moments by pixel key and text embeddings by caption. If ``None``, items hold
            pixels ``[3, H, W]`` and token ids ``[L]`` instead.
    """

    def __init__(
        self,
        stream: Stream,
        tokens: CaptionTokenizer,
        latent: tuple[int, int],
        prompts: Sequence[str],
        moments: Mapping[str, Tensor] | EncodedShards | None = None,
        texts: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(stream)
        self.tokens, self.latent, self.given_prompts = tokens, latent, list(prompts)
        self.moments, self.texts = moments, texts

    @property
    def prompts(self) -> list[str]:
        """The prompts of the sample grids; never empty."""
        return self.given_prompts or [text for text in self.stream.texts() if text] or [""]

    def make_item(self, sample: Sample, u: Tensor, position: Position) -> dict[str, Any]:
        channels, downscale = self.latent
        shape = (channels, sample.height // downscale, sample.width // downscale)
        noise = self.draw_noise(position, *shape)
        item: dict[str, Any] = {"name": sample.name, "part": sample.part, "u": u, **noise}
        item["posterior_noise"] = self.draw_normal("posterior", position, *shape)
        if self.moments is None:
            item["pixels"] = self.stream.pixels(sample)
        else:
            item["moments"] = self.moments[self.stream.pixel_key(sample)]
        if self.stream.masked:
            item["mask"] = functional.avg_pool2d(self.stream.mask(sample), downscale)
        if self.texts is None:
            item["tokens"] = self.tokens(sample.caption)
        else:
            item["text"] = self.texts[text_key(self.tokens(sample.caption))]
        return item


class Config(Protocol):
    """The options that ``text_to_image_dataset`` reads, of the sections Data, Captions and Prompts."""

    resolution: int
    buckets: bool
    bucket_step: int
    center_crop: bool
    cache: bool
    validation_prompt: list[str]


class Family(Protocol):
    """What encodes images and captions; see ``models.families``."""

    tokenizer: Any
    vae: Any
    text_encoder: Any

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the base was made for."""

    @property
    def downscale(self) -> int:
        """Pixels per element of a latent, along a side."""

    @property
    def latent_channels(self) -> int: ...

    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` -> mean and log variance of the latents ``[B, 2C, h, w]``."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids ``[B, L]`` -> text embeddings ``[B, L, D]``."""

    def unload_frozen(self) -> None:
        """Free the memory of the parts that are not trained."""


def text_key(tokens: Tensor) -> str:
    return cache.digest(tokens.tolist())


def text_to_image_dataset(
    cfg: Config, family: Family, stream: Stream, log: Callable[[str], None], trains_text: bool = False
) -> TextToImageDataset:
    """The dataset of a text-to-image method. What is the same each time an image is shown is cached.

    Args:
        log: called with each line that the user should read.
        trains_text: the text encoder is trained, so its output cannot be cached.

    Raises: UserError for a resolution that the base cannot take.
    """
    for option, pixels in {"resolution": cfg.resolution, "bucket_step": cfg.bucket_step}.items():
        if pixels % family.downscale and (option == "resolution" or cfg.buckets):
            raise UserError(f"--{option.replace('_', '-')} {pixels}: this base needs a multiple of {family.downscale}")
    if cfg.resolution > 2 * family.resolution:
        native = f"this base was made for {family.resolution} pixels"
        log(f"{native}; --resolution {cfg.resolution} is far from that")
    tokens = CaptionTokenizer(family.tokenizer)
    if isinstance(stream, ShardStream):
        return _streamed_dataset(cfg, family, stream, tokens, log)
    for line in summarize(stream, tokens.count, tokens.window):
        log(line)
    moments: Mapping[str, Tensor] | None = None
    texts: Mapping[str, Tensor] | None = None
    if cfg.cache and (reason := stream.pixels_cacheable):
        log(f"VAE moments are not cached: {reason}")
    elif cfg.cache:
        variants = {stream.pixel_key(s): s for s in stream.pixel_variants()}

        @torch.no_grad()
        def encode(key: str) -> Tensor:
            return family.moments(stream.pixels(variants[key])[None])[0]

        moments = cache.cached_tensors("moments", family.vae, variants, encode, "Encoding images")
    reason = "the text encoder is trained" if trains_text else stream.text_cacheable
    if cfg.cache and reason:
        log(f"text embeddings are not cached: {reason}")
    elif cfg.cache:
        captions = {text_key(ids): ids for ids in map(tokens, stream.texts())}

        @torch.no_grad()
        def embed(key: str) -> Tensor:
            return family.embed(captions[key][None])[0]

        texts = cache.cached_tensors("texts", family.text_encoder, captions, embed, "Encoding captions")
    if cfg.cache:
        family.unload_frozen()
    latent = family.latent_channels, family.downscale
    return TextToImageDataset(stream, tokens, latent, cfg.validation_prompt, moments, texts)


def _streamed_dataset(
    cfg: Config, family: Family, stream: ShardStream, tokens: CaptionTokenizer, log: Callable[[str], None]
) -> TextToImageDataset:
    """The dataset over shards. Captions are encoded when they are shown; ``--shard-cache`` stores the moments."""
    for line in stream.summary():
        log(line)
    latent = family.latent_channels, family.downscale
    shard_cache = stream.cfg.shard_cache if isinstance(stream.cfg, Latents) else None
    if shard_cache is None:
        if cfg.cache:
            log("nothing of a streamed dataset is cached; --shard-cache FOLDER stores its VAE moments")
        return TextToImageDataset(stream, tokens, latent, cfg.validation_prompt)
    if not cfg.center_crop:
        raise UserError("--shard-cache: random crops differ each time; use --center-crop, or leave --shard-cache out")

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return family.moments(pixels)

    encoded = encode_shards(shard_cache, stream, cache.weights_digest(family.vae), encode, family.vae.dtype)
    family.unload_frozen()
    encoded_stream = ShardStream(stream.cfg, encoded, stream.group)
    return TextToImageDataset(encoded_stream, tokens, latent, cfg.validation_prompt, encoded)
