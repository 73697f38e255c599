"""Distances of images: PSNR, and between unit vectors of features, layer by layer (LPIPS; Zhang et al. 2018).

    d(x, y) = sum_l 1/(H_l W_l) sum_hw | w_l * (f_l(x)_hw - f_l(y)_hw) |^2        (equation 1)

The gradient flows to the images; the network stays as it is.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from sdtune.config.errors import UserError
from sdtune.models.random_conv import RandomConv

VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions, in five groups (Simonyan & Zisserman 2015)."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""By which LPIPS moves and divides the channels of pixels in [-1, 1]."""


def perceptual_distance(name: str) -> "Distance":
    """``random-conv``, or the file of LPIPS' weights; frozen.

    Raises:
        UserError: no such file, or one that holds something else.
    """
    if name == RandomConv.label:
        return RandomDistance().requires_grad_(False).eval()
    return Lpips(Path(name).expanduser()).requires_grad_(False).eval()


class Distance(nn.Module):
    """The distance of each pair of images ``[B, 3, H, W]`` in [-1, 1]: ``[B]``."""

    def layers(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def weighted(self, layer: int, squared: Tensor) -> Tensor:
        """The squared differences ``[B, C, H, W]`` of a layer, summed over its channels: ``[B, ...]``."""
        return squared.sum(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for layer, (one, other) in enumerate(zip(self.layers(x), self.layers(y), strict=True)):
            squared = (unit(one) - unit(other)).square()
            total = total + self.weighted(layer, squared).flatten(1).mean(1)
        return total


class RandomDistance(Distance):
    """In the layers of the random network that comes with the package; all channels weigh alike."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RandomConv()

    def layers(self, x: Tensor) -> list[Tensor]:
        return self.net.layers(x)


class Lpips(Distance):
    """LPIPS in VGG16, its weights and VGG's from one file: the state of `lpips.LPIPS(net="vgg")` as safetensors."""

    def __init__(self, file: Path):
        super().__init__()
        self.net, self.lins = nn.ModuleDict(), nn.ModuleList()
        c_in, index = 3, 0
        for group, widths in enumerate(VGG, 1):
            convs = {}
            index += group > 1  # the pooling before the group counts too
            for c_out in widths:
                convs[str(index)] = nn.Conv2d(c_in, c_out, 3, padding=1)
                c_in, index = c_out, index + 2
            self.net[f"slice{group}"] = nn.ModuleDict(convs)
            self.lins.append(nn.ModuleDict({"model": nn.ModuleDict({"1": nn.Conv2d(c_in, 1, 1, bias=False)})}))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.load_state_dict(self.read(file))

    def read(self, file: Path) -> dict[str, Tensor]:
        """The weights in the file; raises ``UserError`` where one is missing or has another shape."""
        asked = f"--perceptual-network {file}"
        how = (
            'it wants the weights of the package lpips: python -c "import lpips; from safetensors.torch import '
            "save_model; save_model(lpips.LPIPS(net='vgg'), 'lpips.safetensors')\""
        )
        if not file.is_file():
            raise UserError(f"{asked}: no such file; give random-conv, or a file: {how}")
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{asked}: not a safetensors file ({error}); {how}") from None
        wanted, found = self.state_dict(), {}
        for name, weight in wanted.items():
            group = name.split(".")[1]
            other = name.replace(f"lins.{group}.", f"lin{group}.")  # both names stand for one tensor
            tensor = tensors.get(name, tensors.get(other))
            if tensor is None or tensor.shape != weight.shape:
                raise UserError(f"{asked}: holds no {name} of shape {tuple(weight.shape)}; {how}")
            found[name] = tensor
        return found

    def layers(self, x: Tensor) -> list[Tensor]:
        x, found = (x - self.shift) / self.scale, []
        for group in self.net.values():
            if found:
                x = functional.max_pool2d(x, 2)
            for conv in group.values():
                x = functional.relu(conv(x))
            found.append(x)
        return found

    def weighted(self, layer: int, squared: Tensor) -> Tensor:
        return self.lins[layer]["model"]["1"](squared)


def unit(features: Tensor) -> Tensor:
    """Features ``[B, C, H, W]`` as unit vectors at each place; the gradient is bounded where all are zero."""
    return functional.normalize(features, dim=1, eps=1e-3)


@torch.no_grad()
def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [-1, 1] ``[B, C, H, W]``, in dB ``[B]``."""
    return 10 * torch.log10(4 / (y.clamp(-1, 1) - x).square().flatten(1).mean(1).clamp(min=1e-10))
