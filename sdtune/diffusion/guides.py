"""Models that say how well a noised image shows what is asked for; the gradient of that steers a sample.

A guide gives ``scale * log p(y | x_t)`` of each image, up to a constant: `sampling.draw` takes its gradient by x_t.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

NOISED = "noised"
"""Key of a CLIP's configuration: it was trained on noised pictures."""


class Guide(Protocol):
    sees_x0: bool
    """Whether it looks at the estimate of x0, so that its gradient goes through the network."""

    def __call__(self, x_t: Tensor, t: Tensor, x0: Tensor | None, rows: slice) -> Tensor:
        """``[B]``, differentiable.

        Args:
            x_t: noised images ``[B, C, H, W]``.
            t: the timestep of all of them, a scalar.
            x0: the network's estimate of the images, if asked for.
            rows: which images of the call these are.
        """
        ...


class ByClassifier:
    """A classifier of noised images (Dhariwal & Nichol 2021): ``scale * log p(label | x_t)``.

    Args:
        classifier: ``(x_t, t [B]) -> logits [B, K]``.
        labels: what each image of the call is to show, int64 ``[N]``.
    """

    sees_x0 = False

    def __init__(self, classifier: nn.Module, labels: Tensor, scale: float):
        self.classifier, self.labels, self.scale = classifier, labels, scale

    def __call__(self, x_t: Tensor, t: Tensor, x0: Tensor | None, rows: slice) -> Tensor:
        dtype = next(self.classifier.parameters()).dtype
        logits: Tensor = self.classifier(x_t.to(dtype), t.expand(len(x_t)).to(x_t.device))
        labels = self.labels[rows, None].to(x_t.device)
        return self.scale * logits.log_softmax(1).gather(1, labels)[:, 0]


class ClipNetwork(Protocol):
    """What is used here of a `models.vision.Pretrained` whose model is CLIP."""

    model: Any
    side: int

    def __call__(self, x: Tensor) -> Tensor: ...


class ByClip:
    """CLIP's logit for a text (Radford et al. 2021): ``scale * exp(tau) f(x0) . g(text)``, unit vectors f and g.

    Nichol et al. 2021 train a CLIP on noised images for this: one of `sdtune clip --noised` looks at x_t. A usual CLIP
    looks, as practice has it since, at the network's estimate of x0, and the gradient goes through the network:
    log p(text | x_t) is taken to be log p(text | x0) at that estimate, as Chung et al. 2022 do for inverse problems.

    Args:
        network: embeds images.
        texts: unit embedding of each image's text ``[N, D]``.
    """

    def __init__(self, network: ClipNetwork, texts: Tensor, scale: float):
        self.network, self.texts, self.scale = network, texts, scale
        self.sees_x0 = not knows_noise(network.model)

    def __call__(self, x_t: Tensor, t: Tensor, x0: Tensor | None, rows: slice) -> Tensor:
        image = x0 if self.sees_x0 else x_t
        assert image is not None
        full = torch.promote_types(image.dtype, torch.float32)
        seen = opaque_squares(image.to(full), self.network.side).to(self.network.model.dtype)
        cosine = (normalize(self.network(seen).to(full), dim=1) * self.texts[rows]).sum(1)
        scaled: Tensor = self.scale * self.network.model.logit_scale.exp() * cosine
        return scaled


def knows_noise(clip: Any) -> bool:
    """Whether a CLIP was trained on noised pictures."""
    return bool(getattr(clip.config, NOISED, False))


@torch.no_grad()
def embedded(clip: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Unit embeddings of texts, cut to the model's window: ``[N, D]``."""
    window = clip.config.text_config.max_position_embeddings
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=window, return_tensors="pt").to(clip.device)
    return normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=1)


def opaque_squares(x0: Tensor, side: int) -> Tensor:
    """The middle of ``[B, C, H, W]`` in [-1, 1] as RGB in about [0, 1], differentiable: ``[B, 3, side, side]``.

    Greys become three equal channels, and what is transparent shows white.
    """
    x = x0 / 2 + 0.5
    if x.shape[1] in (2, 4):
        alpha = x[:, -1:].clamp(0, 1)
        x = x[:, :-1] * alpha + 1 - alpha
    x = x.expand(-1, 3, -1, -1)
    size = [round(length * side / min(x.shape[2:])) for length in x.shape[2:]]
    x = interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return x[:, :, top : top + side, left : left + side]
