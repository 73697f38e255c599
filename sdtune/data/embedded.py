"""The training items of a prior: position in the run -> the embedding of an image, its caption as CLIP reads it, noise.

Both come from a frozen CLIP, so they are cached; what cannot be, items hold as pixels and tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sdtune.config.sections import Captions
from sdtune.data import Sample, Stream, cache, summarize
from sdtune.data.denoising_dataset import DenoisingDataset, Position
from sdtune.data.lazy_store import encoded_images

MEASURED = 10_000
"""Most images whose embeddings are averaged."""


class Towers(Protocol):
    """What embeds images and captions; see ``models.unclip``."""

    device: torch.device
    width: int
    """Length of an embedding."""

    def image_key(self) -> str:
        """A digest of all that ``embed`` depends on but the picture."""

    def text_key(self) -> str:
        """A digest of all that ``read`` depends on but the caption."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` in [-1, 1] -> embeddings ``[B, D]``."""

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``ids`` ``[B, L]``, and where they are no padding, ``mask`` ``[B, L]``."""

    def read(self, ids: Tensor) -> dict[str, Tensor]:
        """``embeds`` of captions ``[B, D]`` and the ``states`` of their tokens ``[B, L, H]``."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]: ...

    @property
    def window(self) -> int:
        """Tokens of a caption that are read, with the special ones."""


class EmbeddedDataset(DenoisingDataset):
    """Images as embeddings, with captions.

    Args:
        images: embeddings by pixel key; ``None`` where items hold ``pixels`` instead of an ``embedding``.
        texts: what CLIP reads in a caption; ``None`` where items hold its tokens, ``ids``, alone.
    """

    prompts = ("",)

    def __init__(
        self,
        stream: Stream,
        towers: Towers,
        images: Mapping[str, Tensor] | None,
        texts: Mapping[str, dict[str, Tensor]] | None,
    ):
        super().__init__(stream)
        self.towers, self.images, self.texts = towers, images, texts

    @property
    def reads_images(self) -> bool:
        return self.images is None

    def make_item(self, sample: Sample, u: Tensor, position: Position) -> dict[str, Any]:
        noise = self.draw_normal("noise", position, self.towers.width)
        item: dict[str, Any] = {"name": sample.name, "u": u, "noise": noise}
        if self.images is None:
            item["pixels"] = self.stream.pixels(sample)
        else:
            item["embedding"] = self.images[self.stream.pixel_key(sample)]
        tokens = {name: x[0] for name, x in self.towers.tokens([sample.caption]).items()}
        item["mask"] = tokens["mask"]
        return item | ({"ids": tokens["ids"]} if self.texts is None else self.texts[text_key(sample.caption)])

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the embeddings of images that train ``[1, D]``, at most `MEASURED`."""
        samples = [sample for sample, _ in self.stream.pixel_variants().values()]
        samples = samples[:: -(-len(samples) // MEASURED)]
        if self.images is not None:
            found = torch.stack([self.images[self.stream.pixel_key(sample)] for sample in samples])
        else:
            found = torch.cat([self.towers.embed(self.stream.pixels(sample)[None]) for sample in samples])
        return found.mean(0, keepdim=True), found.std(0, keepdim=True)


def text_key(caption: str) -> str:
    return cache.digest(caption)


def embedded_dataset(stream: Stream, towers: Towers, log: Callable[[str], None]) -> EmbeddedDataset:
    """The dataset of a prior; ``log`` gets each line that the user should read."""
    for line in summarize(stream, towers.count_tokens, towers.window):
        log(line)
    assert isinstance(stream.cfg, Captions)
    on_meta = towers.device.type == "meta"
    images: Mapping[str, Tensor] | None = None
    texts: Mapping[str, dict[str, Tensor]] | None = None
    if stream.cfg.cache and (reason := stream.pixels_cacheable):
        log(f"embeddings of images are not cached: {reason}")
    elif stream.cfg.cache:
        variants = stream.pixel_variants()

        @torch.no_grad()
        def embed(key: str) -> Tensor:
            return towers.embed(stream.pixels(*variants[key])[None])[0]

        source = None if on_meta else towers.image_key
        images = encoded_images(stream.cfg, "embeddings", source, variants, embed)
    if stream.cfg.cache and (reason := stream.text_cacheable):
        log(f"captions are not cached: {reason}")
    elif stream.cfg.cache:
        captions = {text_key(caption): caption for caption in stream.texts()}

        @torch.no_grad()
        def read(key: str) -> dict[str, Tensor]:
            return {name: x[0] for name, x in towers.read(towers.tokens([captions[key]])["ids"]).items()}

        source = None if on_meta else towers.text_key
        texts = cache.cached_tensors("texts", source, captions, read, "Encoding captions")
    return EmbeddedDataset(stream, towers, images, texts)
