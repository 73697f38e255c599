"""Judges whether an image shows its prompt (by CLIP) and its class (by a classifier)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdtune.config.sections import UserError
from sdtune.evaluation.features import BATCH
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.models.part_files import read_part
from sdtune.models.pixel_models import read_classes
from sdtune.models.vision import device, frozen, load_clip, load_pretrained

WEIGHT = 2.5
"""w of Hessel et al. 2021: scales the cosines that CLIP gives, about 0 to 0.4, to about 0 to 1."""


class Clip:
    """A CLIP model with its tokenizer. Raises UserError if ``name``, a folder or Hub id, is not one."""

    def __init__(self, name: str):
        self.network, self.tokenizer = load_clip(name)

    @torch.inference_mode()
    def scores(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """CLIPScore of each image and its prompt [N] (Hessel et al. 2021, equation 1): w max(cos(image, text), 0).

        Args:
            seen: features of the images by ``network`` [N, D].
        """
        longest = self.network.model.config.text_config.max_position_embeddings
        vectors = []
        for start in range(0, len(prompts), BATCH):
            texts = list(prompts[start : start + BATCH])
            words = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            vectors.append(self.network.model.get_text_features(**words.to(device())).pooler_output.float().cpu())
        return WEIGHT * functional.cosine_similarity(seen, torch.cat(vectors)).clamp(min=0)


class Classifier:
    """A run of `sdtune classifier`, asked at timestep 0, or an image classifier of transformers.

    Raises UserError when ``name``, a folder or Hub id, is neither.
    """

    def __init__(self, name: str):
        self.name = name
        self.network, self.names = load_classifier(name)

    def right(self, logits: Tensor, classes: Sequence[str]) -> Tensor:
        """1 for each image whose most probable class is the one in ``classes``, else 0: [N].

        Args:
            logits: of the images by ``network`` [N, K].
        """
        asked = torch.tensor([self.names.index(c) for c in classes])
        return (logits.argmax(1) == asked).float()

    def check(self, classes: Sequence[str]) -> None:
        """UserError unless it knows all of ``classes``."""
        if unknown := sorted(set(classes) - set(self.names)):
            shown = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
            raise UserError(f"--classifier {self.name}: knows no class {unknown[0]}; it knows {shown}")


class Noiseless(nn.Module):
    """A noise-aware classifier at timestep 0: RGB [B, 3, side, side] in [0, 1] to logits [B, K]."""

    label = "noisy-classifier"

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier
        self.side, self.channels = classifier.config.sample_size, classifier.config.in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        x = x.mean(1, keepdim=True) if self.channels < 3 else x
        opaque = x.new_ones(len(x), self.channels - x.shape[1], *x.shape[2:])
        return self.classifier(torch.cat([x, opaque], 1), x.new_zeros(len(x), dtype=torch.long))


def load_classifier(name: str) -> tuple[nn.Module, list[str]]:
    """A network from images to logits, and the names of its classes."""
    folder = Path(name).expanduser()
    names = read_classes(str(folder), f"--classifier {name}") if folder.is_dir() else None
    if names is None:
        network = frozen(load_pretrained(name, "--classifier", "AutoModelForImageClassification"))
        classes = network.model.config.id2label
        return network, [classes[k] for k in sorted(classes)]
    own = read_part(NoisyClassifier, str(folder), f"--classifier {name}")
    if not isinstance(own.config.sample_size, int):
        height, width = own.config.sample_size
        raise UserError(f"--classifier {name}: made for images of {width} x {height}, and evaluation looks at squares")
    return frozen(Noiseless(own)), names
