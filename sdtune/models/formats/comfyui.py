"""ComfyUI's loader, for Stable Diffusion 1, 2 and XL.

It reads kohya's keys, and of diffusers' only those of the attention processors of 2023: a ComfyUI file is a kohya
file. Its own deviation is DoRA on rows, where it divides by the norm of the base's weight and not of the changed one
(``weight_decompose`` in comfy/weight_adapter/base.py as of 2026). Each row is off by the ratio of the two norms.
"""

import re
from pathlib import Path

from torch import Tensor

from sdtune.models.formats.keys import Place, assemble
from sdtune.models.formats.kohya import SUFFIXES, tensors
from sdtune.models.formats.names import dotted, text_encoder_name, underscored
from sdtune.models.formats.neutral import AdapterFile

__all__ = ["read", "tensors"]

PREFIXES = {
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
"""Beginnings of the keys that ComfyUI writes itself, with the names of its own modules."""
ENDS = SUFFIXES | {"lora_A.weight": "lora.down", "lora_B.weight": "lora.up", "lora_mid.weight": "lora.mid"}
END = re.compile(rf"(.+)\.({'|'.join(map(re.escape, ENDS))})")


def place(key: str) -> Place | None:
    prefix = next((p for p in PREFIXES if key.startswith(p)), None)
    found = END.fullmatch(key.removeprefix(prefix)) if prefix else None
    if prefix is None or found is None:
        return None
    name = found[1] if PREFIXES[prefix] != "unet" else dotted(underscored(found[1]))
    part = PREFIXES[prefix]
    return None if name is None else (part, name if part == "unet" else text_encoder_name(name), ENDS[found[2]])


def read(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> AdapterFile:
    return AdapterFile(assemble(path, tensors, place), metadata, "comfyui")


NOTE_DORA = (
    "ComfyUI divides DoRA's rows by the norm of the base, not of the changed weight: its images differ a little; "
    "with --model BASE the file is made exact for ComfyUI, and for it alone"
)
