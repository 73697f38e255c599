"""What the items of a method hold beside picture, caption and noise: further images, and further random numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.nn import functional

from sdtune.config.sections import UserError, ValidationImages
from sdtune.data.conditions import Condition, hole, make_condition
from sdtune.data.images import decode, to_tensor
from sdtune.data.stream import Sample, Stream
from sdtune.run import rng


@dataclass(frozen=True)
class FurtherImage:
    """An image beside the picture, which items hold with the same crop and flip: pixels ``[3, H, W]`` in [-1, 1]."""

    column: str | None = None
    """Column of the paired images; ``None`` for an image that is made from the picture."""
    option: str = ""
    """Option that names the column, for messages."""
    condition: Condition | None = None
    """How it is made from the picture."""
    encoded: bool = False
    """Whether items hold its VAE moments ``[2C, h, w]`` where those are cached."""

    @property
    def cached(self) -> bool:
        return self.encoded and self.column is not None


@dataclass(frozen=True)
class Further:
    """What items hold beside picture, caption and noise."""

    images: Mapping[str, FurtherImage] = field(default_factory=dict)
    """By the name that the image has in a batch."""
    draws: Sequence[str] = ()
    """Uniform numbers in [0, 1) of each sample, float64, by what they are for."""

    @property
    def paired(self) -> dict[str, str]:
        """The columns of paired images, each with the option that names it."""
        return {image.column: image.option for image in self.images.values() if image.column is not None}


NOTHING = Further()


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt of a sample grid with the images that go with it."""

    text: str
    images: tuple[Image.Image, ...]
    edit: tuple[str, str] | None = None
    """Captions of the image before the edit and after it, if they are known."""

    def __str__(self) -> str:
        return self.text


def further_pixels(stream: Stream, image: FurtherImage, sample: Sample, position: object) -> Tensor:
    """A further image of the sample at a position: float32 ``[3, H, W]`` in [-1, 1]."""
    return _made(stream, image, stream.pixels(sample, image.column), position)


def _made(stream: Stream, image: FurtherImage, pixels: Tensor, position: object) -> Tensor:
    if image.condition is None:
        return pixels
    return make_condition(image.condition, pixels, rng.generator(stream.seed, "condition", position))


def validation_images(stream: Stream) -> list[Path]:
    """The files of ``--validation-image``, for methods that have it."""
    return stream.cfg.validation_image if isinstance(stream.cfg, ValidationImages) else []


def image_prompts(
    stream: Stream, further: Further, samples: Sequence[Sample], given: Sequence[str], files: Sequence[Path]
) -> list[ImagePrompt]:
    """The images in ``files``, else those of ``samples``, with the ``given`` prompts, else their captions.

    Raises: UserError if a file cannot be read.
    """
    found = []
    for k in range(max(len(files), len(samples), len(given))):
        sample, shown = samples[k % len(samples)], []
        for image in further.images.values():
            read = from_file(files[k % len(files)], sample, stream) if files else stream.pixels(sample, image.column)
            shown.append(to_image(_made(stream, image, read, ("preview", k))))
        text = given[k % len(given)] if given else sample.caption
        found.append(ImagePrompt(text, tuple(shown), None if files or given else sample.edit))
    return found


def hole_of(stream: Stream, sample: Sample, position: object) -> Tensor:
    """The hole that a sample has: where its mask is white if masks are used, else drawn; float32 ``[1, H, W]``."""
    if stream.masked:
        return (stream.mask(sample) >= 0.5).float()
    return hole(sample.height, sample.width, rng.generator(stream.seed, "hole", position))


def hole_prompts(stream: Stream, samples: Sequence[Sample], given: Sequence[str]) -> list[ImagePrompt]:
    """The images of ``samples`` with a hole in each, and the ``given`` prompts, else their captions."""

    def shown(sample: Sample, k: int) -> tuple[Tensor, ...]:
        return stream.pixels(sample), hole_of(stream, sample, ("preview", k)).mul(2).sub(1).expand(3, -1, -1)

    return _prompts_with(samples, given, shown)


def shrunk(pixels: Tensor, times: int) -> Tensor:
    """A picture ``[3, H, W]`` in [-1, 1] at the ``times``-th part of each side: bicubic, without aliases."""
    sides = [side // times for side in pixels.shape[-2:]]
    small = functional.interpolate(pixels[None], size=sides, mode="bicubic", antialias=True)
    return small[0].clamp(-1, 1)


def small_prompts(stream: Stream, samples: Sequence[Sample], given: Sequence[str], times: int) -> list[ImagePrompt]:
    """The images of ``samples`` to enlarge, `shrunk`, and the ``given`` prompts, else their captions."""
    return _prompts_with(samples, given, lambda sample, k: (shrunk(stream.pixels(sample), times),))


def _prompts_with(
    samples: Sequence[Sample], given: Sequence[str], shown: Callable[[Sample, int], tuple[Tensor, ...]]
) -> list[ImagePrompt]:
    """The ``given`` prompts, else captions, with what is ``shown`` of a sample beside prompt k."""
    found = []
    for k in range(max(len(samples), len(given))):
        sample = samples[k % len(samples)]
        images = tuple(map(to_image, shown(sample, k)))
        found.append(ImagePrompt(given[k % len(given)] if given else sample.caption, images))
    return found


def from_file(file: Path, sample: Sample, stream: Stream) -> Tensor:
    """The picture in a file, in the shape of a sample."""
    try:
        image = decode(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--validation-image {file}: cannot be read ({error})") from None
    return to_tensor(image, sample.width, sample.height, 0.5, 0.5, False, stream.cfg.image_interpolation_mode)


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels ``[3, H, W]`` in [-1, 1] as an image."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
