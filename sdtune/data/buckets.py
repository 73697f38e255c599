"""Shapes for aspect-ratio buckets. All have about the same area, so that all steps cost about the same."""

import math

from sdtune.config.sections import Data, UserError

Shape = tuple[int, int]
"""(width, height) in pixels."""


def bucket_shapes(resolution: int, step: int, max_aspect: float) -> list[Shape]:
    """All bucket shapes, largest area first: the square, and for each width the largest height that fits.

    Sides are multiples of ``step``, areas at most ``resolution`` squared, longest over shortest side at most
    ``max_aspect``.

    Raises: UserError if ``step`` is larger than ``resolution``.
    """
    square = resolution // step * step
    if not square:
        raise UserError(f"--bucket-step {step} is larger than --resolution {resolution}: make it smaller")
    found = {(square, square)}
    for width in range(step, square + 1, step):
        height = resolution * resolution // width // step * step
        if height <= width * max_aspect:
            found |= {(width, height), (height, width)}
    return sorted(found, key=lambda shape: (-shape[0] * shape[1], shape))


def nearest_shape(shapes: list[Shape], width: int, height: int) -> Shape:
    """The shape whose log aspect ratio is nearest to that of ``width`` x ``height``; the first one of equals."""
    aspect = math.log(width / height)
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - aspect))


def training_shapes(cfg: Data) -> list[Shape]:
    """The shapes that the images of a run can get."""
    if cfg.buckets:
        return bucket_shapes(cfg.resolution, cfg.bucket_step, cfg.bucket_max_aspect)
    return [(cfg.resolution, cfg.resolution)]
