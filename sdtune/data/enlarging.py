"""The training items of super-resolution: position in the run -> pixels, the small image, and what noises both."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.data import Sample, ShardStream, Stream, summarize
from sdtune.data.denoising_dataset import DenoisingDataset, Position
from sdtune.data.further import ImagePrompt, shrunk, to_image
from sdtune.data.images import decode


class EnlargingDataset(DenoisingDataset):
    """Images without captions, each with its small version.

    Args:
        factor: how many times larger a side becomes.
        shown: files of the small images that the sample grids enlarge, or how many of the dataset they show.
    """

    def __init__(self, stream: Stream, factor: int, shown: Sequence[Path] | int):
        super().__init__(stream)
        self.factor, self.shown = factor, shown

    def make_item(self, sample: Sample, u: Tensor, position: Position) -> dict[str, Any]:
        """``small`` ``[3, h, w]`` beside ``pixels``, noise like ``pixels`` for its enlargement, and of which level."""
        pixels = self.stream.pixels(sample)
        return {
            "name": sample.name,
            "u": u,
            "pixels": pixels,
            **self.draw_noise(position, *pixels.shape),
            "small": shrunk(pixels, self.factor),
            "small_noise": self.draw_normal("small noise", position, *pixels.shape),
            "small_u": self.draw_uniform("small level", position),
        }

    @cached_property
    def prompts(self) -> list[ImagePrompt]:
        """The small images that the sample grids show, each left of its enlargement."""
        if isinstance(self.shown, int):
            samples = self.stream.examples(max(1, self.shown))
            small = [to_image(shrunk(self.stream.pixels(sample), self.factor)) for sample in samples]
        else:
            small = [small_image(file) for file in self.shown]
        return [ImagePrompt("", (image,)) for image in small]


def small_image(file: Path) -> Image.Image:
    """An image of ``--validation-image`` as it is, in RGB, white where it is transparent. Raises: UserError."""
    try:
        return decode(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--validation-image {file}: cannot be read ({error})") from None


def enlarging_dataset(
    stream: Stream, factor: int, log: Callable[[str], None], shown: Sequence[Path] | int
) -> EnlargingDataset:
    """The dataset of super-resolution; ``log`` gets each line that the user should read."""
    for line in stream.summary() if isinstance(stream, ShardStream) else summarize(stream):
        log(line)
    return EnlargingDataset(stream, factor, shown)
