"""Networks that look at images: CLIP, DINO and classifiers of transformers, by folder or Hub id."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from sdtune.config.sections import UserError
from sdtune.models import families
from sdtune.models.part_files import read_part
from sdtune.run.device import best_device


class Pretrained(nn.Module):
    """The image side of a transformers model: CLIP's embedding, DINO's pooled output, or a classifier's logits."""

    def __init__(self, model: nn.Module, side: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model, self.side, self.label = model, side, model.config.model_type
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        encode = getattr(self.model, "get_image_features", self.model)
        out = encode(pixel_values=(x - self.mean) / self.std)
        return out.logits if "logits" in out else out.pooler_output


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False).to(device())


def device() -> torch.device:
    """Where figures are computed; a CPU beside Apple's GPU is fast enough for them, and has 64-bit numbers."""
    return best_device(mps=False)


def load_pretrained(name: str, option: str, auto: str = "AutoModel") -> Pretrained:
    """A model that transformers' class ``auto`` knows, with the scaling of pixels that its own folder tells.

    Raises: UserError that begins with ``option`` when it cannot be read or takes no images.
    """
    import transformers

    families.silence_libraries()
    where = f"{option} {name}: cannot be loaded as a model of images"
    model = read_part(getattr(transformers, auto), name, where)
    try:
        folder = Path(name).expanduser()
        settings = "preprocessor_config.json"
        file = folder / settings if folder.is_dir() else Path(hf_hub_download(name, settings))
        pixels = json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:  # transformers, the Hub and the network raise many kinds; each means the same here
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: {why}") from error
    if not hasattr(model, "get_image_features") and model.main_input_name != "pixel_values":
        raise UserError(f"{option} {name}: a {model.config.model_type} takes no images")
    size = pixels.get("crop_size") if pixels.get("do_center_crop") else pixels.get("size")
    sides = [size] if isinstance(size, int) else sorted((size or {}).values())
    if not sides or "image_mean" not in pixels or "image_std" not in pixels:
        raise UserError(f"{option} {name}: {settings} does not say size, image_mean and image_std")
    return Pretrained(model, sides[0], pixels["image_mean"], pixels["image_std"])


def load_clip(name: str) -> tuple[Pretrained, Any]:
    """A CLIP model with its tokenizer. Raises UserError when ``name``, a folder or Hub id, is none."""
    import transformers

    network = load_pretrained(name, "--clip-model")
    if not hasattr(network.model, "get_text_features"):
        raise UserError(f"--clip-model {name}: a {network.model.config.model_type} reads no text; give a CLIP model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds; each means that there is none
        raise UserError(f"--clip-model {name}: no tokenizer: {str(error).strip().splitlines()[0]}") from error
    return frozen(network), tokenizer
