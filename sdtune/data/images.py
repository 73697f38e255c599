"""Decodes image files: one defined conversion to pixels for every accepted format and mode.

Pillow's own ``convert("RGB")`` turns 16-bit grey white and float TIFF black, shows the colours hidden under
full transparency, and leaves EXIF orientation to the caller. Here grey of any depth is scaled to 8 bits,
transparency becomes white where the pixels have no alpha, CMYK is converted with its embedded profile, and every
image is turned upright.
"""

import hashlib
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

from sdtune.data.missing_rows import missing_rows

with suppress(ImportError):  # the extra `heic`
    from pillow_heif import register_heif_opener

    register_heif_opener()

EXTENSIONS = frozenset(".png .apng .jpg .jpeg .jfif .webp .bmp .tif .tiff .gif .avif .heic .heif".split())
"""Endings of files that count as images, in lower case."""

ACCEPTED = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
"""The same as text for messages."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
"""Formats that are opened, whatever the ending of the file. An .eps named .png would start Ghostscript."""

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Channels of a tensor to Pillow's mode: grey, grey and alpha, colour, colour and alpha."""

ANIMATED = frozenset({"PNG", "GIF", "WEBP", "TIFF", "AVIF"})
"""Formats whose further frames are images too. In JPEG (MPO) and HEIF files they are depth maps and the like."""

TRUNCATED = "truncated: its last pixels are missing"

MAX_PIXELS = 50_000_000
"""A 12,000 x 12,000 1-bit PNG has 17 KB on disk and 1.5 GB in memory."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageInfo(NamedTuple):
    """Facts of an image file: size in pixels when upright, hash of its bytes, mode, and what is wrong with it."""

    width: int
    height: int
    sha256: str
    mode: str = "RGB"
    """One of `MODES`."""
    frames: int = 1
    """Frames of an animation, or pages."""
    dim: bool = False
    """It has 16 bits a channel, but no value above 4095, as if 12 bits were meant."""
    blank: bool = False
    """All of its pixels are black."""
    problem: str | None = None


def inspect_image(data: Path | bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decode an image completely, as training will, since a header does not show that the end is missing.

    A decompression bomb is refused from its header. Never raises: ``problem`` says what is wrong.
    """
    try:
        content = data if isinstance(data, bytes) else data.read_bytes()
    except OSError as error:
        return ImageInfo(0, 0, "", problem=f"cannot be read ({error.strerror})")
    digest = hashlib.sha256(content).hexdigest()
    width = height = 0
    too_large = f"more than {max_pixels / 1e6:g} million pixels; make it smaller"
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                return ImageInfo(width, height, digest, problem=f"{width} x {height} are {too_large}")
            mode, frames = _mode_of(image), frames_of(image)
            pixels = _upright(image, mode)
            width, height = pixels.size
            blank = pixels.convert("RGB").getbbox() is None
            dim = image.mode.startswith("I;16") and not blank and int(np.asarray(image).max()) < 4096
            short = missing_rows(content, image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return ImageInfo(width, height, digest, problem=too_large)
    except UnidentifiedImageError:
        return ImageInfo(width, height, digest, problem=_not_an_image(content))
    except Exception as error:  # a broken file can raise any error in Pillow's decoders
        return ImageInfo(width, height, digest, problem=f"truncated or corrupt ({error})")
    if short:
        return ImageInfo(width, height, digest, problem=TRUNCATED)
    return ImageInfo(width, height, digest, mode, frames, dim, blank)


def frames_of(image: Image.Image) -> int:
    """Frames of an animation, or pages; further pictures in a photograph do not count."""
    return int(getattr(image, "n_frames", 1)) if image.format in ANIMATED else 1


def decode(data: Path | bytes, mode: str = "RGB", first_frame: bool = True, complete: bool = False) -> Image.Image:
    """The image in one of `MODES`, 8 bits a channel, upright.

    Args:
        first_frame: take the first frame of an animation, which is an error otherwise.
        complete: make sure that no rows are missing; an image that `inspect_image` has seen needs no second look.

    Raises: OSError (also for a file that is no image), ValueError or SyntaxError on a broken file.
    """
    with Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS / 1e6:g} million pixels")
        if not first_frame and (frames := frames_of(image)) > 1:
            raise ValueError(many_frames(frames))
        pixels = _upright(image, mode)
        if complete and missing_rows(data if isinstance(data, bytes) else data.read_bytes(), image):
            raise ValueError(TRUNCATED)
        return pixels


def many_frames(frames: int) -> str:
    return f"has {frames} frames; take the first with --first-frame, or save the one that is meant"


def cover(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The smallest size in pixels to which an image of ``size`` can be scaled to cover ``width`` x ``height``."""
    scale = max(width / size[0], height / size[1])
    return max(width, round(size[0] * scale)), max(height, round(size[1] * scale))


@lru_cache(4096)
def corner(size: tuple[int, int], width: int, height: int, left: float, top: float) -> tuple[int, int]:
    """The crop's upper left corner in pixels of the covering image; offsets in [0, 1], 0.5 is centred."""
    covering = cover(size, width, height)
    return round(left * (covering[0] - width)), round(top * (covering[1] - height))


def to_tensor(
    image: Image.Image, width: int, height: int, left: float, top: float, flip: bool, interpolation: str
) -> torch.Tensor:
    """Resize to cover ``width`` x ``height``, crop, then flip: float32 [C, height, width] in [-1, 1].

    Args:
        left, top: share of the surplus that is cut off on that side, in [0, 1]; 0.5 is the centre.
        interpolation: Pillow's name of the filter, in lower case.
    """
    covering = cover(image.size, width, height)
    x, y = corner(image.size, width, height, left, top)
    # Resizing only the crop's box gives the same pixels as resize-then-crop (the filter still sees beyond the
    # box's edges) without the scaled image, which would be 850,000 pixels wide for one of 5000 x 3.
    sx, sy = image.width / covering[0], image.height / covering[1]
    right, bottom = min((x + width) * sx, image.width), min((y + height) * sy, image.height)
    resample = Image.Resampling[interpolation.upper()]
    image = image.resize((width, height), resample, box=(x * sx, y * sy, right, bottom))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).reshape(height, width, -1).permute(2, 0, 1).contiguous()
    return pixels.float() / 127.5 - 1


def _mode_of(image: Image.Image) -> str:
    """The smallest of `MODES` that holds all that the image has, by its own mode and not by its pixels."""
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    return ("LA" if grey else "RGBA") if image.has_transparency_data else ("L" if grey else "RGB")


def _upright(image: Image.Image, mode: str) -> Image.Image:
    image.load()  # first: TIFF turns itself and drops the tag here, and PNG may have EXIF after the pixels
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels may be good although the EXIF data is broken
        orientation = 1
    pixels = _converted(image, mode)
    return pixels.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else pixels


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert(mode)
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        try:
            profile = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
            screen = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, profile, screen, outputMode="RGB")
            assert converted is not None
            return converted.convert(mode)
        except (ImageCms.PyCMSError, OSError):  # a broken profile counts as none
            return image.convert("RGB").convert(mode)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        if mode.endswith("A"):
            return seen.convert(mode)
        white = Image.new("RGB", image.size, "white")
        white.paste(seen, mask=seen.getchannel("A"))
        return white.convert(mode)
    return image.convert(mode) if image.mode in ("1", "L") else image.convert("RGB").convert(mode)


def _eight_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey of more than 8 bits as uint8 [H, W].

    ``I;16`` spans 0..65535. 32-bit integers and floats have no fixed range: the smallest of the usual
    ranges (0..1 for floats, 0..255, 0..65535) that holds all values is taken, else lowest to highest value.
    """
    grey = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    low, high = float(grey.min()), float(grey.max())
    ranges: tuple[int, ...] = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    span: float | None = next((top for top in ranges if low >= 0 and high <= top), None)
    if span is None:
        grey, span = grey - low, max(high - low, 1e-9)
    eight: npt.NDArray[np.uint8] = np.rint(grey * (255 / span)).astype(np.uint8)
    return eight


def _not_an_image(content: bytes) -> str:
    start = content[:512].lstrip().lower()
    if not content:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image; run `git lfs pull`"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image"
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        return "a HEIC image; pip install 'sdtune[heic]'"
    return f"not an image of the accepted kinds ({ACCEPTED})"
