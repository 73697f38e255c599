"""The training items of an autoencoder: position in the run -> pixels, and the noise with which its latent is drawn."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from sdtune.config.sections import Data, UserError
from sdtune.data import Sample, ShardStream, Stream, summarize
from sdtune.data.further import ImagePrompt, from_file, to_image
from sdtune.run import rng

Position = int | tuple[str, int]
"""A position in the run, or ``("holdout", k)``: the k-th held-out image."""


class AutoencodingDataset(Dataset[dict[str, Any]]):
    """Images without captions.

    Args:
        latent: channels of a latent, and pixels per element of it along a side.
        shown: files of the images that the sample grids show, or how many of the dataset they show.
    """

    def __init__(self, stream: Stream, latent: tuple[int, int], shown: Sequence[Path] | int):
        self.stream, self.seed, self.latent, self.shown = stream, stream.seed, latent, shown

    def __getitem__(self, position: Position) -> dict[str, Any]:
        sample = self.stream[position] if isinstance(position, int) else self.stream.holdout[position[1]]
        return self.make_item(sample, position)

    def make_item(self, sample: Sample, position: Position) -> dict[str, Any]:
        channels, downscale = self.latent
        size = channels, sample.height // downscale, sample.width // downscale
        noise = torch.randn(size, generator=rng.generator(self.seed, "posterior", position))
        return {"name": sample.name, "pixels": self.stream.pixels(sample), "posterior_noise": noise}

    @property
    def reads_images(self) -> bool:
        """Always: what comes from an image is not kept, since the encoder may change."""
        return True

    @property
    def holdout(self) -> list[tuple[str, int]]:
        return [("holdout", k) for k in range(len(self.stream.holdout))]

    @cached_property
    def prompts(self) -> list[ImagePrompt]:
        """The images that the sample grids show, each left of its reconstruction."""
        stream, shown = self.stream, self.shown
        if isinstance(shown, int):
            pixels = [stream.pixels(sample) for sample in stream.examples(max(1, shown))]
        else:
            (sample,) = stream.examples(1)
            pixels = [from_file(file, sample, stream) for file in shown]
        return [ImagePrompt("", (to_image(x),)) for x in pixels]

    def scored_prompts(self, count: int) -> list[ImagePrompt]:
        """Those of the sample grids."""
        return self.prompts


def check_shapes(cfg: Data, multiple: int) -> None:
    """Raises: UserError for images whose sides an autoencoder cannot halve as often as it does."""
    for option, pixels in {"resolution": cfg.resolution, "bucket_step": cfg.bucket_step}.items():
        if pixels % multiple and (option == "resolution" or cfg.buckets):
            raise UserError(f"--{option.replace('_', '-')} {pixels}: this autoencoder needs a multiple of {multiple}")


def autoencoding_dataset(
    cfg: Data, stream: Stream, latent: tuple[int, int], log: Callable[[str], None], shown: Sequence[Path] | int
) -> AutoencodingDataset:
    """The dataset of an autoencoder; ``log`` gets each line that the user should read."""
    for line in stream.summary() if isinstance(stream, ShardStream) else summarize(stream):
        log(line)
    return AutoencodingDataset(stream, latent, shown)
