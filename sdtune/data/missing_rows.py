"""Finds PNG and JPEG files that end before the last row of pixels that their header promises.

Pillow decodes such files without an error: the missing rows of a PNG are black, those of a JPEG have one colour.
"""

import struct
import zlib
from io import BytesIO

from PIL import Image

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""PNG colour type -> channels."""

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, step of columns and step of rows of each pass of an interlaced PNG."""

_PROBE = bytes((37 * i) % 251 for i in range(256))
"""Data for a JPEG decoder that still waits for some."""


def missing_rows(content: bytes, image: Image.Image) -> bool:
    """Whether rows are missing at the end.

    Args:
        image: ``content`` decoded by Pillow, not yet converted.
    """
    if image.format == "PNG":
        return _png_is_short(content)
    return image.format == "JPEG" and _jpeg_is_short(content, image)


def _png_is_short(content: bytes) -> bool:
    width, height, bits, colour = struct.unpack(">IIBB", content[16:26])
    interlaced = content[28] == 1
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    needed = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            needed += rows * (1 + (columns * bits * _CHANNELS[colour] + 7) // 8)
    stream, at = zlib.decompressobj(), 8
    while at + 8 <= len(content) and needed > 0:
        (size,) = struct.unpack(">I", content[at : at + 4])
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        at += 12 + size
        if kind != b"IDAT":
            continue
        while data and needed > 0 and not stream.eof:
            needed -= len(stream.decompress(data, 1 << 20))
            data = stream.unconsumed_tail
    return needed > 0


def _jpeg_is_short(content: bytes, image: Image.Image) -> bool:
    """Whether data put before the end of the file changes the image: then its decoder waited for more."""
    last = image.crop((0, image.height - 1, image.width, image.height))
    extrema = last.getextrema()
    channels = extrema if isinstance(extrema[0], tuple) else (extrema,)
    end = content.rfind(b"\xff\xd9")
    if end < 0 or any(low != high for low, high in channels):
        return False  # missing rows have one colour
    with Image.open(BytesIO(content[:end] + _PROBE + content[end:]), formats=("JPEG",)) as longer:
        longer.load()
        return longer.tobytes() != image.tobytes()
