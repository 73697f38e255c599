"""Whether images agree with those that they were to follow, or to edit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional

from sdtune.data import Images
from sdtune.data.conditions import edges
from sdtune.data.images import decode, to_tensor
from sdtune.evaluation.features import embed_each
from sdtune.evaluation.judges import Clip
from sdtune.models.controls import read_image


def edge_overlaps(images: Images, rows: Sequence[int], followed: Sequence[Path]) -> Tensor:
    """`edge_overlap` of each image with the image in a file that it followed: [N].

    Raises: UserError for a file that cannot be read.
    """
    asked = (read_image(file, f"--condition: {file}") for file in followed)
    return torch.stack([edge_overlap(decode(images.read(row)), x) for row, x in zip(rows, asked, strict=True)])


def edge_overlap(image: Image, followed: Image) -> Tensor:
    """The overlap (intersection over union) of the edges of an image with the image that it followed, in [0, 1].

    An edge is where a colour changes steeply, as ``--condition edges`` has it, and white in an image to follow. Both
    are a pixel wider on each side, so that an edge that is one pixel off still overlaps. Without any edge they agree.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    height, width = pixels.shape[-2:]
    asked = to_tensor(followed.convert("RGB"), width, height, 0.5, 0.5, False, "box")
    one, other = (functional.max_pool2d((x[:1] > 0).float(), 3, 1, 1).bool() for x in (edges(pixels), asked))
    union = (one | other).sum()
    return (one & other).sum() / union if union else torch.tensor(1.0)


def edit_directions(
    clip: Clip, seen: Tensor, edited: Sequence[Path], before: Sequence[str], after: Sequence[str]
) -> Tensor:
    """How far each image changed as its captions say: [N] in [-1, 1]; see `Clip.directions`.

    Args:
        seen: features of the images by the network of ``clip`` [N, D].
        edited: the image that each was made from.
        before, after: captions of the image before the edit, and of what the edit was to show.

    Raises: UserError for a file that cannot be read.
    """
    vectors: dict[Path, Tensor] = {}
    for file in dict.fromkeys(edited):  # one at a time, since photographs are large
        pixels = torch.from_numpy(np.array(read_image(file, f"--condition: {file}"))).permute(2, 0, 1)
        vectors[file] = embed_each([pixels.float() / 127.5 - 1], clip.network)[0]
    return clip.directions(torch.stack([vectors[file] for file in edited]), seen, before, after)
