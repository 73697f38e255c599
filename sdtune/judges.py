"""Does a picture show what was asked for: its prompt, by CLIP; its class, by a classifier."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdtune.configs import UserError
from sdtune.data import Images
from sdtune.features import BATCH, device, features_of, load_pretrained, ready

WEIGHT = 2.5
"""w of Hessel et al. 2021: stretches the cosines that CLIP gives, about 0 to 0.4, to about 0 to 1."""


@torch.inference_mode()
def clip_scores(images: Images, rows: Sequence[int], prompts: Sequence[str], model: str) -> Tensor:
    """CLIPScore of each image and its prompt [N] (Hessel et al. 2021, equation 1): w max(cos(image, text), 0).

    Raises: UserError when ``model`` is no CLIP model with a tokenizer.
    """
    import transformers

    network = load_pretrained(model, "--clip-model")
    if not hasattr(network.model, "get_text_features"):
        raise UserError(f"--clip-model {model}: a {network.model.config.model_type} reads no text; give a CLIP model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of many kinds; each means that there is none
        raise UserError(f"--clip-model {model}: no tokenizer: {str(error).strip().splitlines()[0]}") from error
    ready(network)
    seen = features_of(images, network, rows)
    longest = network.model.config.text_config.max_position_embeddings
    told = []
    for start in range(0, len(prompts), BATCH):
        texts = list(prompts[start : start + BATCH])
        words = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device())
        told.append(network.model.get_text_features(**words).pooler_output.float().cpu())
    return WEIGHT * functional.cosine_similarity(seen, torch.cat(told)).clamp(min=0)


def right_classes(images: Images, rows: Sequence[int], classes: Sequence[str], classifier: str) -> Tensor:
    """1 where the most probable class of an image is the one it was asked to be, else 0: [N].

    Args:
        classifier: a run of `sdtune classifier`, asked at timestep 0, or a transformers model of image classification.

    Raises: UserError for anything else, and for a class that it does not know.
    """
    network, names = load_classifier(classifier)
    if unknown := sorted(set(classes) - set(names)):
        raise UserError(
            f"--classifier {classifier}: knows no class {unknown[0]}; it knows {', '.join(names[:20])}"
            + (", ..." if len(names) > 20 else "")
        )
    asked = torch.tensor([names.index(c) for c in classes])
    return (features_of(images, network, rows).argmax(1) == asked).float()


class Noiseless(nn.Module):
    """A noise-aware classifier asked at timestep 0: RGB [B, 3, side, side] in [0, 1] to logits [B, K]."""

    label = "noisy-classifier"

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier, self.side, self.channels = (
            classifier,
            classifier.config.sample_size,
            classifier.config.in_channels,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        x = x.mean(1, keepdim=True) if self.channels < 3 else x
        opaque = x.new_ones(len(x), self.channels - x.shape[1], *x.shape[2:])
        return self.classifier(torch.cat([x, opaque], 1), x.new_zeros(len(x), dtype=torch.long))


def load_classifier(name: str) -> tuple[nn.Module, list[str]]:
    """A network from images to logits, and the names of its classes."""
    folder = Path(name).expanduser()
    if not (folder / "classes.json").is_file():
        network = ready(load_pretrained(name, "--classifier", "AutoModelForImageClassification"))
        classes = network.model.config.id2label
        return network, [classes[k] for k in sorted(classes)]
    from sdtune.noisy_classifier import NoisyClassifier

    try:
        names = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        return ready(Noiseless(NoisyClassifier.from_pretrained(folder))), names
    except (OSError, ValueError) as error:
        raise UserError(f"--classifier {name}: {str(error).splitlines()[0]}") from error
