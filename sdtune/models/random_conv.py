"""A network of random weights that come with the package: features of images without a download."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class RandomConv(nn.Module):
    """A small convolutional network with random weights, fixed for good: RGB [B, 3, 64, 64] in [0, 1] to [B, 256].

    Features of an untrained network distinguish two sets of images, and for images other than photographs better than
    those learned on ImageNet (Naeem et al. 2020, section 4). They say nothing of what an image shows. The weights are
    made of raw bits of PCG64, a stream that numpy promises not to change, so figures of any two machines compare.
    """

    label = "random-conv"
    side = 64
    WIDTHS = (3, 32, 64, 64, 64)

    def __init__(self, seed: int = 0):
        super().__init__()
        bits = np.random.PCG64(seed)
        self.convs = nn.ModuleList()
        for c_in, c_out in zip(self.WIDTHS, self.WIDTHS[1:], strict=False):
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            uniform = (bits.random_raw(conv.weight.numel()) >> np.uint64(11)) * 2.0**-53
            weights = (2 * uniform - 1) * math.sqrt(6 / (c_in * 9))  # of variance 2 / fan-in (He et al. 2015)
            conv.weight.data = torch.from_numpy(weights.astype(np.float32)).view_as(conv.weight)
            self.convs.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        for conv in self.convs:
            x = math.sqrt(2) * functional.avg_pool2d(functional.relu(conv(x)), 2)  # keeps features near 1, as KID likes
        return functional.adaptive_avg_pool2d(x, 2).flatten(1)

    def layers(self, x: Tensor) -> list[Tensor]:
        """What each convolution answers to RGB ``[B, 3, H, W]`` in [-1, 1] of any size from 16 pixels a side on."""
        found = []
        for conv in self.convs:
            found.append(functional.relu(conv(x)))
            x = math.sqrt(2) * functional.avg_pool2d(found[-1], 2)
        return found
