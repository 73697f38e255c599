"""Judges whether an image shows its prompt (by CLIP) and its class (by a classifier)."""

import re
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

    def scores(self, seen: Tensor, prompts: Sequence[str]) -> Tensor:
        """CLIPScore of each image and its prompt [N] (Hessel et al. 2021, equation 1): w max(cos(image, text), 0).

        Args:
            seen: features of the images by ``network`` [N, D].
        """
        return WEIGHT * functional.cosine_similarity(seen, self.read(prompts)).clamp(min=0)

    def directions(
        self, before: Tensor, after: Tensor, text_before: Sequence[str], text_after: Sequence[str]
    ) -> Tensor:
        """Whether edits change images as their captions change: [N], the cosine of both changes, 0 where nothing did.

        Args:
            before, after: features of the images by ``network`` [N, D].

        Gal et al. 2022 (StyleGAN-NADA), equation 2, without the ``1 -``.
        """
        asked = self.read(text_after) - self.read(text_before)
        return functional.cosine_similarity(after - before, asked)

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of texts, which are cut where they are too long: [N, D]."""
        longest = self.network.model.config.text_config.max_position_embeddings
        vectors = []
        for start in range(0, len(texts), BATCH):
            part = list(texts[start : start + BATCH])
            words = self.tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            vectors.append(self.network.model.get_text_features(**words.to(device())).pooler_output.float().cpu())
        return torch.cat(vectors)


class Classifier:
    """A run of `sdtune classifier`, asked at timestep 0, or an image classifier of transformers.

    Raises UserError when ``name``, a folder or Hub id, is neither.
    """

    def __init__(self, name: str):
        self.name = name
        self.network, self.names = load_classifier(name)

    def right(self, logits: Tensor, asked: Sequence[str]) -> Tensor:
        """1 for each image whose most probable class is the one asked for, else 0: [N].

        Args:
            logits: of the images by ``network`` [N, K].
            asked: a class each, or a caption that names one.
        """
        return (logits.argmax(1) == torch.tensor(list(map(self.class_of, asked)))).float()

    def class_of(self, text: str) -> int:
        """The number of the class that ``text`` is, or names; see `named`. Raises UserError for none or several."""
        found = named(text, self.names)
        if len(found) == 1:
            return found[0]
        if found:
            several = " and ".join(self.names[k] for k in found)
            raise UserError(f'--classifier {self.name}: "{text}" names several of its classes, {several}')
        shown = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
        raise UserError(f'--classifier {self.name}: "{text}" names no class of it; it knows {shown}')


def named(text: str, labels: Sequence[str]) -> list[int]:
    """The labels that a text is or names, by number.

    A label goes by what stands between its commas ("tabby, tabby cat"), in whole words; the case of letters does not
    matter. Of two names, one of which is part of the other, the longer one counts.
    """
    if text in labels:
        return [labels.index(text)]
    names = [(_words(name), k) for k, label in enumerate(labels) for name in label.split(",")]
    found = [(name, k) for name, k in names if name.strip() and name in _words(text)]
    return sorted({k for name, k in found if not any(name != other and name in other for other, _ in found)})


def _words(text: str) -> str:
    """The words of a text in small letters with a space around each, so that whole words can be looked for."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.casefold()), ""])


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
