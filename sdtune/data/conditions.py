"""Images that a control network follows, made from the picture itself, so that a dataset needs no second image."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Condition = Literal["edges", "blur", "grey", "mask"]

_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
_EDGE = 0.2
"""Change of a colour over two pixels, as a share of its range, from which on there is an edge."""


def make_condition(kind: Condition, pixels: Tensor, rng: torch.Generator) -> Tensor:
    """What a picture is reduced to: float32 ``[3, H, W]`` in [-1, 1], like ``pixels``.

    Args:
        kind: ``edges``: white where a colour changes steeply (Sobel's operator), black elsewhere; ``blur``: each pixel
            the mean of about a sixteenth of a side around it; ``grey``: the brightness alone; ``mask``: the picture
            with a rectangle of it left grey, which is where ``rng`` says.
    """
    match kind:
        case "edges":
            return edges(pixels)
        case "blur":
            return blurred(pixels)
        case "grey":
            weights = pixels.new_tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow converts
            return (weights[:, None, None] * pixels).sum(0, keepdim=True).expand_as(pixels).contiguous()
        case "mask":
            return masked(pixels, rng)


def edges(pixels: Tensor) -> Tensor:
    """1 where the gradient of any channel is steep, else -1."""
    across = pixels.new_tensor(_SOBEL)
    kernels = torch.stack([across, across.T])[:, None] / 8  # their response to a step is its height
    padded = functional.pad(pixels[:, None], (1, 1, 1, 1), mode="replicate")
    steepest = functional.conv2d(padded, kernels).square().sum(1).sqrt().amax(0)
    return torch.where(steepest > _EDGE, 1.0, -1.0).expand_as(pixels).contiguous()


def blurred(pixels: Tensor) -> Tensor:
    """A mean over a square, three times, which is nearly a Gaussian."""
    reach = max(1, min(pixels.shape[-2:]) // 32)
    for _ in range(3):
        padded = functional.pad(pixels[None], (reach, reach, reach, reach), mode="replicate")
        pixels = functional.avg_pool2d(padded, 2 * reach + 1, stride=1)[0]
    return pixels


def masked(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """The picture with a rectangle set to 0, the middle of the range."""
    height, width = pixels.shape[-2:]
    return torch.where(rectangle(height, width, rng), 0.0, pixels)


def rectangle(height: int, width: int, rng: torch.Generator) -> Tensor:
    """Where a rectangle of a third to two thirds of each side is, as ``rng`` says: bool ``[1, H, W]``."""
    sides, places = torch.rand(2, generator=rng) / 3 + 1 / 3, torch.rand(2, generator=rng)
    (tall, wide), (top, left) = sides.tolist(), ((1 - sides) * places).tolist()
    inside = torch.zeros(1, height, width, dtype=torch.bool)
    rows = slice(round(top * height), round((top + tall) * height))
    inside[:, rows, round(left * width) : round((left + wide) * width)] = True
    return inside


def hole(height: int, width: int, rng: torch.Generator) -> Tensor:
    """What an inpainting model has to paint: float32 ``[1, H, W]``, 1 inside of it.

    A rectangle, or one time in four all of the picture, as Stable Diffusion's inpainting models were trained.
    """
    inside = rectangle(height, width, rng)
    return torch.ones(1, height, width) if torch.rand((), generator=rng) < 0.25 else inside.float()
