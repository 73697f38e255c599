"""Models that say how well a noised image shows what is asked for; the gradient of that steers a sample.

A guide gives ``scale * log p(y | x_t)`` of each image, up to a constant: `sampling.draw` takes its gradient by x_t.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize


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
        logits = self.classifier(x_t, t.expand(len(x_t)).to(x_t.device))
        labels = self.labels[rows, None].to(x_t.device)
        return self.scale * logits.float().log_softmax(1).gather(1, labels)[:, 0]


class ByClip:
    """CLIP's logit for a text (Radford et al. 2021): ``scale * exp(tau) f(x0) . g(text)``, unit vectors f and g.

    Nichol et al. 2021 train a CLIP on noised images for this, which few models have. Here, as practice has it since,
    a usual CLIP looks at the network's estimate of x0, and the gradient goes through the network: log p(text | x_t) is
    taken to be log p(text | x0) at that estimate, as Chung et al. 2022 do for inverse problems.

    Args:
        clip: a transformers ``CLIPModel``.
        processor: its image processor, for size, filter, mean and standard deviation.
        texts: unit embedding of each image's text ``[N, D]``.
    """

    sees_x0 = True

    def __init__(self, clip: nn.Module, processor: Any, texts: Tensor, scale: float):
        self.clip, self.processor, self.texts, self.scale = clip, processor, texts, scale

    def __call__(self, x_t: Tensor, t: Tensor, x0: Tensor | None, rows: slice) -> Tensor:
        seen = clip_pixels(x0, self.processor).to(self.clip.dtype)
        image = normalize(self.clip.get_image_features(pixel_values=seen).pooler_output, dim=1)
        return self.scale * self.clip.logit_scale.exp() * (image * self.texts[rows]).sum(1)


@torch.no_grad()
def embedded(clip: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Unit embeddings of texts, cut to the model's window: ``[N, D]``."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(clip.device)
    return normalize(clip.get_text_features(**tokens).pooler_output, dim=1)


def clip_pixels(x0: Tensor, processor: Any) -> Tensor:
    """``[B, C, H, W]`` in [-1, 1] as CLIP's image processor would have it, differentiable: ``[B, 3, S, S]``.

    Greys become three equal channels, and what is transparent shows white.
    """
    x = x0 / 2 + 0.5
    if x.shape[1] in (2, 4):
        alpha = x[:, -1:].clamp(0, 1)
        x = x[:, :-1] * alpha + 1 - alpha
    x = x.expand(-1, 3, -1, -1)
    height, width = x.shape[2:]
    side, crop = processor.size["shortest_edge"], processor.crop_size["height"]
    size = [max(side, round(length * side / min(height, width))) for length in (height, width)]
    mode = "bilinear" if processor.resample == 2 else "bicubic"
    x = interpolate(x, size, mode=mode, antialias=True, align_corners=False)
    top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
    x = x[:, :, top : top + crop, left : left + crop]
    mean, std = (
        torch.tensor(numbers).to(x).reshape(3, 1, 1) for numbers in (processor.image_mean, processor.image_std)
    )
    return (x - mean) / std
