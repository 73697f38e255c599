"""Shapes for aspect-ratio buckets. All have about the same area, so that all steps cost about the same."""

import math

from sdtune.config.sections import Data, UserError

SMALLEST = 0.85
"""Smallest area of a bucket, as a share of the square of the resolution."""

Shape = tuple[int, int]
"""(width, height) in pixels."""


def bucket_shapes(resolution: float, step: int, max_aspect: float) -> list[Shape]:
    """All bucket shapes, largest area first.

    Sides are multiples of ``step``, the longest side is at most ``max_aspect`` times the shortest, and areas are
    between ``SMALLEST`` and 1 times ``resolution`` squared. If the step is a sixteenth of the resolution, photographs
    of 5:4, 4:3, 3:2, 16:10 and 16:9 lose less than 3 % of their area.

    Raises: UserError if ``step`` is larger than ``resolution``.
    """
    square = int(resolution // step) * step
    if not square:
        raise UserError(f"--bucket-step {step} is larger than --resolution {resolution:g}: make it smaller")
    found = {(square, square)}
    largest = round(resolution * resolution)
    for width in range(step, square + 1, step):
        for height in range(width, largest // width + 1, step):
            if height <= width * max_aspect and width * height >= SMALLEST * largest:
                found |= {(width, height), (height, width)}
    return sorted(found, key=lambda shape: (-shape[0] * shape[1], shape))


def nearest_shape(shapes: list[Shape], width: int, height: int) -> Shape:
    """The shape whose log aspect ratio is nearest to that of ``width`` x ``height``; the first one of equals."""
    if len(shapes) == 1:
        return shapes[0]
    aspect = math.log(width / height)
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - aspect))


def training_shapes(cfg: Data) -> list[Shape]:
    """The shapes that the images of a run can get."""
    width, height = cfg.image_size
    if not cfg.buckets:
        return [(width, height)]
    shapes = bucket_shapes(math.sqrt(width * height), cfg.bucket_step, cfg.bucket_max_aspect)
    if width == height:
        return shapes
    least = SMALLEST * width * height  # the square of `bucket_shapes` may be smaller
    return [(width, height), *(s for s in shapes if s != (width, height) and s[0] * s[1] >= least)]
