"""Shapes for aspect-ratio buckets: of about one area, so that a step costs the same whatever its shape."""

import math

from sdtune.config.sections import Data, UserError

Shape = tuple[int, int]
"""(width, height) in pixels."""


def shapes(resolution: int, step: int, max_aspect: float) -> list[Shape]:
    """All shapes, largest area first: the square, and the longest for each width.

    Sides are multiples of ``step``, areas at most ``resolution`` squared, longest over shortest side at most
    ``max_aspect``.

    Raises: UserError when not even a square of one step fits.
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


def nearest(candidates: list[Shape], width: int, height: int) -> Shape:
    """The candidate whose log aspect ratio is nearest to ``width`` x ``height``; of equals the first."""
    aspect = math.log(width / height)
    return min(candidates, key=lambda shape: abs(math.log(shape[0] / shape[1]) - aspect))


def candidates(cfg: Data) -> list[Shape]:
    """The shapes that the images of a run may get."""
    if cfg.buckets:
        return shapes(cfg.resolution, cfg.bucket_step, cfg.bucket_max_aspect)
    return [(cfg.resolution, cfg.resolution)]
