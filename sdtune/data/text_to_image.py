"""The training items of the text-to-image methods: position in the run -> image, caption and noise as tensors.

Everything random of position ``p`` is drawn here, on the CPU, in the loader's workers, from ``(seed, purpose, p)``. So
it does not depend on the process, worker or batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sdtune.config.sections import Latents, UserError
from sdtune.data import Sample, ShardStream, Stream, cache, summarize
from sdtune.data.denoising_dataset import DenoisingDataset, Position
from sdtune.data.encoded_shards import EncodedShards, encode_shards
from sdtune.data.further import (
    NOTHING,
    Further,
    ImagePrompt,
    further_pixels,
    hole_of,
    hole_prompts,
    image_prompts,
    shrunk,
    small_prompts,
)


class TextToImageDataset(DenoisingDataset):
    """Captioned images.

    Args:
        latent: (channels of a latent, pixels per element of it along a side).
        prompts: of the sample grids; empty for the captions of the dataset.
        sizes: whether items hold the ``size`` of image and crop (``Stream.sizes``).
        moments, texts: cached VAE moments by pixel key, and by caption the tensors that the denoiser is told. If
            ``None``, items hold pixels ``[3, H, W]`` and the caption instead.
        further: what else items hold.
        holes: whether items hold a hole to paint, ``hole`` ``[1, H, W]``, and the picture without it, ``kept``.
        small: whether items hold the picture at the size of a latent, ``small`` ``[3, h, w]``, and the draws from which
            it is noised: ``small_noise`` like it, and ``small_u``, uniform in [0, 1).
        pictures: the same samples with their pixels, where ``stream`` has moments alone.
    """

    def __init__(
        self,
        stream: Stream,
        latent: tuple[int, int],
        prompts: Sequence[str],
        sizes: bool = False,
        moments: Mapping[str, Tensor] | EncodedShards | None = None,
        texts: cache.Store | cache.MetaStore | None = None,
        further: Further = NOTHING,
        holes: bool = False,
        small: bool = False,
        pictures: Stream | None = None,
    ):
        super().__init__(stream)
        self.holes, self.small, self.pictures = holes, small, pictures or stream
        self.latent, self.given_prompts, self.sizes = latent, list(prompts), sizes
        self.moments, self.texts, self.further = moments, texts, further
        self.longest = 0 if texts is None else texts.longest(map(text_key, stream.texts()), "mask")

    @property
    def prompts(self) -> Sequence[str | ImagePrompt]:
        """The prompts of the sample grids, with images where the method needs them; never empty."""
        if self.further.images:
            return image_prompts(self.pictures, self.further, self.given_prompts)
        if self.holes:
            return hole_prompts(self.stream, self.given_prompts)
        if self.small:
            return small_prompts(self.stream, self.given_prompts, self.latent[1])
        return self.given_prompts or [text for text in self.stream.texts() if text] or [""]

    @property
    def reads_images(self) -> bool:
        anew = any(not image.cached for image in self.further.images.values())
        return self.moments is None or self.stream.masked or self.holes or self.small or anew

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
        if self.sizes:
            item["size"] = torch.tensor(self.stream.sizes(sample))
        if self.holes:
            hole = hole_of(self.stream, sample, position)
            item |= {"hole": hole, "kept": self.stream.pixels(sample) * (hole < 0.5)}
        if self.small:
            pixels = item["pixels"] if "pixels" in item else self.stream.pixels(sample)
            item["small"] = shrunk(pixels, downscale)
            item["small_noise"] = self.draw_normal("small noise", position, *item["small"].shape)
            item["small_u"] = self.draw_uniform("small level", position)
        for name, image in self.further.images.items():
            if image.cached and self.moments is not None:
                item[name] = self.moments[self.stream.pixel_key(sample, image.column)]
            else:
                item[name] = further_pixels(self.stream, image, sample, position)
        for name in self.further.draws:
            item[name] = self.draw_uniform(name, position)
        if self.texts is None:
            item["caption"] = sample.caption
        else:
            text = self.texts[text_key(sample.caption)]
            if "mask" in text:
                text = text | {name: self.padded(text[name]) for name in ("embeds", "mask")}
            item |= {f"text.{name}": tensor for name, tensor in text.items()}
        return item

    def padded(self, tensor: Tensor) -> Tensor:
        """A tensor of a caption ``[L, ...]``, as long as that of the longest caption of the run."""
        return torch.cat([tensor, tensor.new_zeros(self.longest - len(tensor), *tensor.shape[1:])])


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


def text_key(caption: str) -> str:
    return cache.digest(caption)


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
        columns = [None, *(image.column for image in further.images.values() if image.cached)]
        variants = {stream.pixel_key(s, column): (s, column) for s in stream.pixel_variants() for column in columns}

        @torch.no_grad()
        def encode(key: str) -> Tensor:
            return family.moments(stream.pixels(*variants[key])[None])[0]

        vae_key = None if on_meta else family.vae_key
        moments = cache.cached_tensors("moments", vae_key, variants, encode, "Encoding images")
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
