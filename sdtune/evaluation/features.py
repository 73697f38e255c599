"""Turns images into features, by a network of the user's choice; distances between sets are measured in them.

    network = load_network("random-conv")                 # or inception, a file of its weights, a CLIP or DINO model
    x = embed(samples, network)                           # pixels [N, C, H, W] in [-1, 1] -> [N, D]
    y = features_of(load_images(Data(dataset="photos", resolution=8), captions=False), network)
    frechet(x, y)                                         # of sdtune.evaluation.distances

Every image becomes RGB (grey in all three channels, transparency on white) and is resized to the network's square by
torch's bicubic filter with antialiasing, without rounding to 8 bits: a filter without antialiasing, and the rounding,
change an FID by more than what papers report as progress (Parmar et al. 2022).
"""

import difflib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from sdtune.config.sections import UserError
from sdtune.data import Images, cache_root
from sdtune.data.cache import Store, digest, make_folder, weights_digest, write_tensors
from sdtune.data.images import decode
from sdtune.evaluation.inception import Inception, download, load_inception
from sdtune.models.random_conv import RandomConv
from sdtune.models.vision import device, frozen, load_pretrained

BATCH = 16
"""Images in a forward pass. Not an option: the last bits of a feature depend on it, and features are cached."""
CHUNK = 1024
"""Images in a file of the cache; a call that is stopped loses at most these."""


def load_network(name: str) -> nn.Module:
    """``random-conv``, ``inception``, a file of Inception weights, or a transformers model by folder or Hub id.

    Its ``label`` is a part of the figures' names; ``side`` is the side of its input in pixels.

    Raises: UserError for a name that is none of these, and for files that do not hold a network.
    """
    path = Path(name).expanduser()
    if name == RandomConv.label:
        network: nn.Module = RandomConv()
    elif name == Inception.label:
        network = load_inception(download())
    elif path.is_file():
        network = load_inception(path)
    elif path.is_dir() or (name.count("/") == 1 and name[0] not in "./~"):
        network = load_pretrained(name, "--features")
    else:
        close = difflib.get_close_matches(name, (RandomConv.label, Inception.label), 1)
        hint = f"did you mean {close[0]}?" if close else "give random-conv, inception, or the path or Hub id of a model"
        raise UserError(f"--features {name}: no such network, file or folder; {hint}")
    return frozen(network)


def embed(pixels: Tensor, network: nn.Module) -> Tensor:
    """Features [N, D], float32 on the CPU, of ``pixels`` [N, C, H, W] in [-1, 1] with 1 to 4 channels."""
    return embed_each(list(pixels), network)


def embed_each(images: Sequence[Tensor], network: nn.Module) -> Tensor:
    """The same of images [C, H, W] of any sizes; without images an empty tensor."""
    parts = [images[k : k + BATCH] for k in range(0, len(images), BATCH)]
    found = [forward([square(image, network.side) for image in part], network) for part in parts]
    return torch.cat(found) if found else torch.empty(0)


def features_of(images: Images, network: nn.Module, rows: Sequence[int] | None = None) -> Tensor:
    """Features [N, D] of ``rows`` (default: all). Images seen before come from the cache, whatever their file names."""
    rows = range(len(images.rows)) if rows is None else rows
    # The last digits depend on the kind of device
    key = digest(weights_digest(network), network.side, BATCH, device().type)
    folder = cache_root() / "features" / f"{type(network).__name__}-{key}"
    make_folder(folder, "set SDTUNE_CACHE to a folder that you may write to")
    by_content = {images.rows[i].sha256: i for i in rows}
    missing = sorted(by_content.keys() - Store(folder).index.keys())
    with progress() as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task(f"Features ({network.label})", total=len(missing), visible=len(missing) > BATCH)
        for chunk in (missing[k : k + CHUNK] for k in range(0, len(missing), CHUNK)):
            found: dict[str, Tensor] = {}
            for keys in (chunk[k : k + BATCH] for k in range(0, len(chunk), BATCH)):
                squares = list(pool.map(lambda key: read(images, by_content[key], network.side), keys))
                found |= zip(keys, forward(squares, network).clone(), strict=True)
                bar.advance(task, len(keys))
            write_tensors(folder / f"{digest(*chunk)}.safetensors", found)
    store = Store(folder)
    return torch.stack([store[images.rows[i].sha256] for i in rows])


def progress() -> Progress:
    """A progress bar on a terminal; elsewhere nothing is printed."""
    quiet = not Console(stderr=True).is_terminal
    return Progress(console=Console(stderr=True, quiet=quiet), transient=True)


def read(images: Images, index: int, side: int) -> Tensor:
    """An image as [3, side, side] in [0, 1]."""
    pixels = torch.from_numpy(np.array(decode(images.read(index)))).permute(2, 0, 1)
    return square(pixels.float() / 127.5 - 1, side)


def square(pixels: Tensor, side: int) -> Tensor:
    """One image [C, H, W] in [-1, 1], of 1 to 4 channels, as RGB [3, side, side] in [0, 1]."""
    pixels = (pixels.float() + 1) / 2
    if len(pixels) in (2, 4):
        alpha = pixels[-1:]
        pixels = pixels[:-1] * alpha + 1 - alpha
    rgb = pixels.expand(3, -1, -1)
    resized = functional.interpolate(rgb[None], (side, side), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)


@contextmanager
def full_float32() -> Iterator[None]:
    """Context in which a GPU rounds no factor to TF32: figures have to compare between machines."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_float32()
@torch.inference_mode()
def forward(squares: Sequence[Tensor], network: nn.Module) -> Tensor:
    """The features of at most `BATCH` images.

    A pass always has `BATCH` images, blank ones at the end, so the result does not depend on how many there are.
    """
    batch = torch.stack(list(squares))
    blank = batch.new_zeros(BATCH - len(batch), *batch.shape[1:])
    return network(torch.cat([batch, blank]).to(device()))[: len(batch)].float().cpu()
