"""Finds PNG and JPEG files whose data ends before the last pixel that their header promises.

Pillow decodes such files without an error when their end mark is there: what is missing of a PNG is black, what is
missing of a JPEG has one colour, or is blurred.
"""

import math
import re
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""PNG colour type -> channels."""

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, step of columns and step of rows of each pass of an interlaced PNG."""

_PROBE = bytes((37 * i) % 251 for i in range(256))
"""Data for a JPEG decoder that still waits for some."""

_NEARLY_FLAT = 8
"""Levels of grey by which one colour may vary once it was interpolated with its neighbours."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers that begin a frame."""

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_NEXT_SEGMENT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def missing_rows(content: bytes, image: Image.Image) -> bool:
    """Whether pixels are missing at the end.

    Args:
        image: ``content`` decoded by Pillow, not yet converted.
    """
    if image.format == "PNG":
        return _png_is_short(content)
    try:
        return image.format in ("JPEG", "MPO") and _jpeg_is_short(content, image)
    except (struct.error, IndexError, KeyError, ValueError):  # Pillow has decoded it all the same
        return False


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
    """Whether data put before the end of a JPEG changes the image: then its decoder waited for more.

    Behind a restart marker that is lost such data is skipped, so these markers are counted. The last block of missing
    data has one colour; only progressive files, whose first scan holds a blurred picture, need the second decoding
    whatever that block shows.
    """
    scans = _scans(content)
    if scans is None:
        return False
    if scans.restarts_lost:
        return True
    x, y = ((side - 1) // 8 * 8 for side in image.size)
    last = image.crop((x, y, *image.size)).convert("L").tobytes()
    if not scans.progressive and max(last) - min(last) > _NEARLY_FLAT:
        return False
    longer_file = content[: scans.end] + _PROBE + b"\xff\xd9"
    with Image.open(BytesIO(longer_file), formats=("JPEG",)) as longer:
        longer.load()
        return longer.tobytes() != image.tobytes()


@dataclass(frozen=True)
class _Scans:
    """What the segments of a JPEG file say of its scans; ``end`` is where its end mark stands."""

    end: int
    progressive: bool
    restarts_lost: bool


def _scans(content: bytes) -> _Scans | None:
    """The scans of the first picture in a JPEG file; ``None`` where its segments cannot be followed."""
    at, progressive, lost, interval = 2, False, False, 0
    width = height = 0
    sampling: dict[int, tuple[int, int]] = {}
    while at + 4 <= len(content):
        marker = content[at + 1]
        if content[at] != 0xFF:
            return None
        if marker == 0xD9:
            break
        (size,) = struct.unpack(">H", content[at + 2 : at + 4])
        segment, at = content[at + 4 : at + 2 + size], at + 2 + size
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", segment[1:5])
            sampling = {segment[k]: (segment[k + 1] >> 4, segment[k + 1] & 15) for k in range(6, len(segment), 3)}
            progressive = marker in (0xC2, 0xCA)
        elif marker == 0xDD:
            (interval,) = struct.unpack(">H", segment[:2])
        elif marker == 0xDA:
            found = _NEXT_SEGMENT.search(content, at)
            end = found.start() if found else len(content)
            if interval and height:
                parts = [sampling[segment[k]] for k in range(1, 1 + 2 * segment[0], 2)]
                blocks = _blocks(width, height, parts, list(sampling.values()))
                lost = lost or len(_RESTART.findall(content, at, end)) < math.ceil(blocks / interval) - 1
            at = end
    return _Scans(at, progressive, lost)


def _blocks(width: int, height: int, scan: list[tuple[int, int]], frame: list[tuple[int, int]]) -> int:
    """The blocks that a scan is counted in: those of one component, or of all of them together (ITU T.81, A.2)."""
    across, down = (max(sides) for sides in zip(*frame, strict=True))
    if len(scan) > 1:
        return math.ceil(width / (8 * across)) * math.ceil(height / (8 * down))
    ((h, v),) = scan
    return math.ceil(math.ceil(width * h / across) / 8) * math.ceil(math.ceil(height * v / down) / 8)
