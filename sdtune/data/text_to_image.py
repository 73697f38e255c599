"""Makes the dataset of a text-to-image method: what is the same each time an image is shown is cached."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sdtune.config.sections import Latents, UserError
from sdtune.data import ShardStream, Stream, cache, summarize
from sdtune.data.encoded_shards import encode_shards
from sdtune.data.further import NOTHING, Further
from sdtune.data.lazy_store import encoded_images
from sdtune.data.text_to_image_dataset import TextToImageDataset, text_key


class Config(Protocol):
    """The options that ``text_to_image_dataset`` reads, of the sections Data, Captions and Prompts."""

    resolution: int
    buckets: bool
    bucket_step: int
    center_crop: bool
    cache: bool
    lazy_cache: bool
    validation_prompt: list[str]


class Family(Protocol):
    """What encodes images and captions; see ``models.families``."""

    vae: Any
    device: torch.device
    conditions_on_size: bool
    """Whether the denoiser is told the sizes of image and crop."""
    paints_holes: bool
    """Whether the denoiser is told a hole, and what is around it."""

    enlarges: bool
    """Whether the denoiser enlarges a small picture."""

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the base was made for."""

    @property
    def downscale(self) -> int:
        """Pixels per element of a latent, along a side."""

    @property
    def size_multiple(self) -> int:
        """Sides of an image in pixels are multiples of this."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def caption_window(self) -> int:
        """Tokens of a caption that are read, with the special ones."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Lengths of captions in tokens, with the special ones."""

    def lost_words(self, caption: str) -> str:
        """The words of a caption that lie beyond the window."""

    @property
    def longer_captions(self) -> str:
        """The option that has captions beyond the window read; empty if there is none."""

    def vae_key(self) -> str:
        """A digest of the weights of the VAE."""

    def text_key(self) -> str:
        """A digest of all that ``encode`` depends on except the caption."""

    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` -> mean and log variance of the latents ``[B, 2C, h, w]``."""

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> the tensors that the denoiser is told of them, by name, each ``[B, ...]``."""

    def unload_frozen(self) -> None:
        """Free the memory of the parts that are not trained."""


def text_to_image_dataset(
    cfg: Config,
    family: Family,
    stream: Stream,
    log: Callable[[str], None],
    trains_text: bool = False,
    further: Further = NOTHING,
) -> TextToImageDataset:
    """The dataset of a text-to-image method. What is the same each time an image is shown is cached.

    Args:
        log: called with each line that the user should read.
        trains_text: the text encoder is trained, so its output cannot be cached.
        further: what items hold beside picture, caption and noise.

    Raises: UserError for a resolution that the base cannot take.
    """
    multiple = family.size_multiple
    for option, pixels in {"resolution": cfg.resolution, "bucket_step": cfg.bucket_step}.items():
        if pixels % multiple and (option == "resolution" or cfg.buckets):
            raise UserError(f"--{option.replace('_', '-')} {pixels}: this base needs a multiple of {multiple}")
    if cfg.resolution > 2 * family.resolution:
        native = f"this base was made for {family.resolution} pixels"
        log(f"{native}; --resolution {cfg.resolution} is far from that")
    if isinstance(stream, ShardStream):
        return _streamed_dataset(cfg, family, stream, log, further)
    about_text = family.count_tokens, family.caption_window, family.lost_words, family.longer_captions
    for line in summarize(stream, *about_text):
        log(line)
    moments: Mapping[str, Tensor] | None = None
    texts: cache.Store | cache.MetaStore | None = None
    on_meta = family.device.type == "meta"
    if cfg.cache and (reason := stream.pixels_cacheable):
        log(f"VAE moments are not cached: {reason}")
    elif cfg.cache:
        variants = stream.pixel_variants([image.column for image in further.images.values() if image.cached])

        @torch.no_grad()
        def encode(key: str) -> Tensor:
            return family.moments(stream.pixels(*variants[key])[None])[0]

        vae_key = None if on_meta else family.vae_key
        moments = encoded_images(cfg, "moments", vae_key, variants, encode, family.unload_frozen)
        family.unload_frozen()  # the VAE is not beside the text encoders
    reason = "the text encoder is trained" if trains_text else stream.text_cacheable
    if cfg.cache and reason:
        log(f"text embeddings are not cached: {reason}")
    elif cfg.cache:
        captions = {text_key(caption): caption for caption in stream.texts()}

        @torch.no_grad()
        def embed(key: str) -> dict[str, Tensor]:
            return {name: tensor[0] for name, tensor in family.encode([captions[key]]).items()}

        all_text = None if on_meta else family.text_key
        texts = cache.cached_tensors("texts", all_text, captions, embed, "Encoding captions")
    if cfg.cache:
        family.unload_frozen()
    latent, sizes = (family.latent_channels, family.downscale), family.conditions_on_size
    holes, small, prompts = family.paints_holes, family.enlarges, cfg.validation_prompt
    return TextToImageDataset(stream, latent, prompts, sizes, moments, texts, further, holes, small)


def _streamed_dataset(
    cfg: Config, family: Family, stream: ShardStream, log: Callable[[str], None], further: Further
) -> TextToImageDataset:
    """The dataset over shards. Captions are encoded when they are shown; ``--shard-cache`` stores the moments."""
    for line in stream.summary():
        log(line)
    latent, sizes = (family.latent_channels, family.downscale), family.conditions_on_size
    shard_cache = stream.cfg.shard_cache if isinstance(stream.cfg, Latents) else None
    if shard_cache is None:
        if cfg.cache:
            log("nothing of a streamed dataset is cached; --shard-cache FOLDER stores its VAE moments")
        holes, small, prompts = family.paints_holes, family.enlarges, cfg.validation_prompt
        return TextToImageDataset(stream, latent, prompts, sizes, further=further, holes=holes, small=small)
    as_pixels = any(not image.cached for image in further.images.values())
    if as_pixels or stream.masked or family.paints_holes or family.enlarges:
        what = "masks" if stream.masked else "images to follow" if as_pixels else "pixels"
        raise UserError(f"--shard-cache: stores no {what}, which this run needs; leave it out")
    if not cfg.center_crop:
        raise UserError("--shard-cache: random crops differ each time; use --center-crop, or leave --shard-cache out")

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return family.moments(pixels)

    encoded = encode_shards(shard_cache, stream, family.vae_key(), encode, family.vae.dtype)
    family.unload_frozen()
    moments_alone = ShardStream(stream.cfg, encoded, stream.group, paired=stream.paired)
    return TextToImageDataset(
        moments_alone, latent, cfg.validation_prompt, sizes, encoded, further=further, pictures=stream
    )
