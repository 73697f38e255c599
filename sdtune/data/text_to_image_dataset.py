"""The training items of the text-to-image methods: position in the run -> image, caption and noise as tensors.

Everything random of position ``p`` is drawn here, on the CPU, in the loader's workers, from ``(seed, purpose, p)``. So
it does not depend on the process, worker or batch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdtune.config.sections import Preview
from sdtune.data import Sample, Stream, cache
from sdtune.data.denoising_dataset import DenoisingDataset, Position
from sdtune.data.encoded_shards import EncodedShards
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
    validation_images,
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
        if not self.prompts_have_images:
            return self.given_prompts or [text for text in self.stream.texts() if text] or [""]
        assert isinstance(self.stream.cfg, Preview)
        examples = self.pictures.examples(max(1, self.stream.cfg.num_validation_images))
        return self._image_prompts(examples, self.given_prompts, validation_images(self.pictures))

    @property
    def prompts_have_images(self) -> bool:
        return bool(self.further.images) or self.holes or self.small

    def scored_prompts(self, count: int) -> Sequence[str | ImagePrompt]:
        """Of prompts with images held-out ones with their captions, else those of the grids, but up to ``count``."""
        if self.prompts_have_images and self.pictures.holdout:
            return self._image_prompts(self.pictures.holdout[:count], [], [])
        if self.prompts_have_images and not validation_images(self.pictures):
            return self._image_prompts(self.pictures.examples(count), self.given_prompts, [])
        return self.prompts

    def _image_prompts(
        self, samples: Sequence[Sample], given: Sequence[str], files: Sequence[Path]
    ) -> list[ImagePrompt]:
        if self.further.images:
            return image_prompts(self.pictures, self.further, samples, given, files)
        if self.holes:
            return hole_prompts(self.stream, samples, given)
        return small_prompts(self.stream, samples, given, self.latent[1])

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


def text_key(caption: str) -> str:
    return cache.digest(caption)
