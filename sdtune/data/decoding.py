"""The training items of unCLIP's decoder: position in the run -> latent and embedding of an image, and noise.

Both come from frozen networks, so they are cached; what cannot be, items hold as pixels, and as what CLIP sees of them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sdtune.data import Sample, Stream, cache, summarize
from sdtune.data.denoising_dataset import DenoisingDataset, Position
from sdtune.data.further import ImagePrompt, from_file, to_image
from sdtune.data.lazy_store import encoded_images


class Known(NamedTuple):
    """What is cached: latents and embeddings by pixel key, and the embedding of a picture that is all zeros to CLIP."""

    latents: Mapping[str, Tensor]
    embeddings: Mapping[str, Tensor]
    blank: Tensor


class Towers(Protocol):
    device: torch.device
    side: int

    def image_key(self) -> str: ...
    def embed(self, pixels: Tensor) -> Tensor: ...
    def blank(self, like: Tensor) -> Tensor: ...


class DecodingDataset(DenoisingDataset):
    """Images without captions.

    Args:
        latent: channels of a latent, and pixels per element of it along a side.
        side: of what CLIP sees, in pixels.
        known: what is cached; ``None`` where items hold ``pixels``, ``seen`` and whether the embedding is ``dropped``.
        dropout: share of embeddings in whose place stands that of a picture of zeros.
        shown: files of the images of which the sample grids show variations, or how many of the dataset.
    """

    def __init__(
        self,
        stream: Stream,
        latent: tuple[int, int],
        side: int,
        known: Known | None,
        dropout: float,
        shown: Sequence[Path] | int,
    ):
        super().__init__(stream)
        self.latent, self.side, self.known, self.dropout, self.shown = latent, side, known, dropout, shown

    @property
    def reads_images(self) -> bool:
        return self.known is None

    @property
    def prompts(self) -> list[ImagePrompt]:
        """The images whose variations the sample grids show."""
        samples = self.stream.examples(self.shown if isinstance(self.shown, int) else 1)
        if isinstance(self.shown, int):
            return [ImagePrompt("", (to_image(self.stream.pixels(sample)),)) for sample in samples]
        return [ImagePrompt("", (to_image(from_file(file, samples[0], self.stream)),)) for file in self.shown]

    def make_item(self, sample: Sample, u: Tensor, position: Position) -> dict[str, Any]:
        channels, downscale = self.latent
        noise = self.draw_noise(position, channels, sample.height // downscale, sample.width // downscale)
        item: dict[str, Any] = {"name": sample.name, "u": u, **noise}
        # held-out images keep their embedding
        dropped = isinstance(position, int) and float(self.draw_uniform("embedding", position)) < self.dropout
        if self.known is None:
            pixels = self.stream.pixels(sample)
            return item | {"pixels": pixels, "seen": seen(pixels, self.side), "dropped": torch.tensor(dropped)}
        key = self.stream.pixel_key(sample)
        embedding = self.known.blank if dropped else self.known.embeddings[key]
        return item | {"latents": self.known.latents[key], "embedding": embedding}


def seen(pixels: Tensor, side: int) -> Tensor:
    """The middle of a picture ``[3, H, W]`` at the size that CLIP sees: ``[3, side, side]``."""
    short = min(pixels.shape[1:])
    top, left = ((n - short) // 2 for n in pixels.shape[1:])
    square = pixels[None, :, top : top + short, left : left + short]
    if short == side:
        return square[0]
    return interpolate(square, (side, side), mode="bicubic", antialias=True)[0].clamp(-1, 1)


class Config(Protocol):
    cache: bool
    lazy_cache: bool
    embedding_dropout: float
    validation_image: list[Path]
    num_validation_images: int


def decoding_dataset(
    cfg: Config,
    stream: Stream,
    towers: Towers,
    movq: Any,
    encode: Callable[[Any, Tensor], Tensor],
    log: Callable[[str], None],
) -> DecodingDataset:
    """The dataset of a decoder; ``log`` gets each line that the user should read.

    Args:
        encode: latents ``[B, C, h, w]`` that ``movq`` makes of pixels.
    """
    for line in summarize(stream):
        log(line)
    known = None
    if cfg.cache and (reason := stream.pixels_cacheable):
        log(f"latents and embeddings are not cached: {reason}")
    elif cfg.cache:
        variants = stream.pixel_variants()
        on_meta = towers.device.type == "meta"

        @torch.no_grad()
        def latent(key: str) -> Tensor:
            return encode(movq, stream.pixels(*variants[key])[None])[0]

        @torch.no_grad()
        def embedding(key: str) -> Tensor:
            return towers.embed(seen(stream.pixels(*variants[key]), towers.side)[None])[0]

        movq_key = None if on_meta else lambda: cache.weights_digest(movq)
        latents = encoded_images(cfg, "latents", movq_key, variants, latent)
        image_key = None if on_meta else towers.image_key
        embeddings = encoded_images(cfg, "embeddings", image_key, variants, embedding)
        with torch.no_grad():
            blank = towers.embed(towers.blank(torch.zeros(1, 3, towers.side, towers.side)))[0]
        known = Known(latents, embeddings, blank if on_meta else blank.cpu())
    scale = 2 ** (len(movq.config.block_out_channels) - 1)
    shown = cfg.validation_image or cfg.num_validation_images
    return DecodingDataset(
        stream, (movq.config.latent_channels, scale), towers.side, known, cfg.embedding_dropout, shown
    )
