"""The Inception network of FID, up to its features, which Heusel et al. 2017 measured in.

It is Szegedy et al. 2016's Inception v3 as TensorFlow published it at the end of 2015, which is not what torchvision
calls ``inception_v3``: average pooling leaves the padding out, and the last block pools by maximum. A Fréchet
distance is an FID only with these weights in this network. torch-fidelity and pytorch-fid publish the weights as one
and the same file; both packages, and clean-fid, import torchvision, which sdtune does without, hence the network here.
"""

import hashlib
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdtune.config.sections import UserError

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

Step = tuple[str, int, int | tuple[int, int]]
"""Name of a convolution, its output channels, its kernel."""


class Convolution(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, "same" if pad and stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, each a chain of convolutions, and a pooled one after them.

    Args:
        branches: chains; a last step that is a list of two forks the chain.
        pool: ``avg`` or ``max`` with a convolution to ``pooled`` channels, or ``half``, which halves the sides, as
            does then the last convolution of each chain.
    """

    def __init__(self, channels: int, branches: list[list[Step | list[Step]]], pool: str, pooled: int = 0):
        super().__init__()
        self.pool = pool
        self.chains = []
        for steps in branches:
            width, chain = channels, []
            for number, step in enumerate(steps, 1):
                fork = step if isinstance(step, list) else [step]
                stride = 2 if pool == "half" and number == len(steps) else 1
                for name, out, kernel in fork:
                    self.add_module(name, Convolution(width, out, kernel, stride))
                chain.append([name for name, _, _ in fork])
                width = fork[0][1]
            self.chains.append(chain)
        if pooled:
            self.branch_pool = Convolution(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
            out.append(h)
        if self.pool == "half":
            return torch.cat([*out, functional.max_pool2d(x, 3, 2)], 1)
        average = self.pool == "avg"
        pooled = (
            functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if average else functional.max_pool2d(x, 3, 1, 1)
        )
        return torch.cat([*out, self.branch_pool(pooled)], 1)


def block_a(channels: int, pooled: int) -> Mixed:
    fives: list = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    threes: list = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(channels, [[("branch1x1", 64, 1)], fives, threes], "avg", pooled)


def block_b(channels: int) -> Mixed:
    threes: list = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(channels, [[("branch3x3", 384, 3)], threes], "half")


def block_c(c: int) -> Mixed:
    short: list = [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))]
    names = [f"branch7x7dbl_{k}" for k in (1, 2, 3, 4, 5)]
    long: list = list(zip(names, (c, c, c, c, 192), (1, (7, 1), (1, 7), (7, 1), (1, 7)), strict=True))
    return Mixed(768, [[("branch1x1", 192, 1)], short, long], "avg", 192)


def block_d(channels: int) -> Mixed:
    names = [f"branch7x7x3_{k}" for k in (1, 2, 3, 4)]
    sevens: list = list(zip(names, (192,) * 4, (1, (1, 7), (7, 1), 3), strict=True))
    return Mixed(channels, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], sevens], "half")


def block_e(channels: int, pool: str) -> Mixed:
    short: list = [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]]
    long: list = [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
    ]
    return Mixed(channels, [[("branch1x1", 320, 1)], short, long], pool, 192)


class Inception(nn.Module):
    """RGB [B, 3, 299, 299] in [0, 1] to features [B, 2048]: the mean over the last block, before any logits."""

    label = "inception"
    side = 299

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (block_c(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "avg"), block_e(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        x = (x * 255 - 128) / 128
        for name, block in self.named_children():
            x = block(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = functional.max_pool2d(x, 3, 2)
        return x.mean(dim=(2, 3))


def load_inception(file: Path) -> Inception:
    """The network with the weights in ``file``; its ``label`` is ``inception`` only if they are those of FID.

    Raises:
        UserError: for a file that holds anything but weights of this network.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of TorchScript, which is refused
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        why = "a TorchScript program" if "TorchScript" in str(error) else "cannot be read as tensors"
        raise UserError(f"--features {file}: {why}; give {URL.rpartition('/')[2]}, which is at {URL}") from error
    network = Inception()
    wanted = {k: v.shape for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    shapes = {k: v.shape for k, v in weights.items()} if isinstance(weights, dict) else {}
    if missing := [name for name, shape in wanted.items() if shapes.get(name) != shape]:
        raise UserError(
            f"--features {file}: not the Inception network of FID: {len(missing)} of its {len(wanted)} tensors are "
            f"not there, such as {missing[0]}; give {URL.rpartition('/')[2]}"
        )
    network.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        network.label = f"inception-{found[:8]}"
    return network


def download() -> Path:
    """The published weights, downloaded once into torch's own cache; `UserError` says what to do without a network."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(file), hash_prefix=SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--features inception: its weights cannot be downloaded ({error}); fetch {URL} elsewhere and give "
                "its path, or use --features random-conv, which needs no download"
            ) from error
    return file
