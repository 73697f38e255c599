"""A discriminator of patches (PatchGAN; Isola et al. 2017), and the hinge losses of both players (Lim & Ye 2017)."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional


class PatchDiscriminator(nn.Module):
    """Pixels ``[B, C, H, W]`` to a logit for each patch ``[B, 1, h, w]``; above 0 is a real one.

    It normalises in groups of channels, so that an image's logits do not depend on the others of its batch.

    Args:
        width: channels of the first layer; each next one has twice as many, at most eight times.
        layers: that halve the image; a patch has 34 pixels a side with 2 of them, 70 with 3.
    """

    def __init__(self, channels: int, width: int, layers: int):
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for k in range(1, layers + 1):
            before, after, stride = width * min(2 ** (k - 1), 8), width * min(2**k, 8), 2 if k < layers else 1
            parts += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*parts, nn.Conv2d(width * min(2**layers, 8), 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def fooled(self, x: Tensor) -> Tensor:
        """The generator's loss of each image ``[B]``; the weights of the discriminator are constants in it."""
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        return -functional_call(self, frozen, (x,)).flatten(1).mean(1)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss of each pair of images ``[B]``, of their logits ``[B, ...]``."""
    below, above = functional.relu(1 - real).flatten(1).mean(1), functional.relu(1 + fake).flatten(1).mean(1)
    return (below + above) / 2


@torch.no_grad()
def adaptive_weights(features: Tensor, wanted: Tensor, got: Tensor, kernel: int) -> Tensor:
    """How much larger the one loss moves the last convolution than the other does (Esser et al. 2021): ``[B]``.

    Each image has a weight of its own, so that it does not depend on how a step is cut into batches.

    Args:
        features: input of that convolution ``[B, C, H, W]``, which is padded to keep the size.
        wanted: gradient of the reconstruction loss with respect to its output ``[B, c, H, W]``; ``got``: likewise of
            the adversarial loss.
    """
    size = (wanted.shape[1], features.shape[1], kernel, kernel)

    def norm(image: int, gradient: Tensor) -> Tensor:
        one = slice(image, image + 1)
        return torch.nn.grad.conv2d_weight(
            features[one].float(), size, gradient[one].float(), padding=kernel // 2
        ).norm()

    ratios = [norm(k, wanted) / (norm(k, got) + 1e-4) for k in range(len(features))]
    return torch.stack(ratios).clamp(max=1e4)
