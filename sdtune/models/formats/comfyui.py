"""ComfyUI's loader.

For Stable Diffusion 1, 2 and XL it reads kohya's keys, and of diffusers' only those of the attention processors of
2023: such a file is a kohya file. Its own deviation is DoRA on rows, where it divides by the norm of the base's weight
and not of the changed one (``weight_decompose`` in comfy/weight_adapter/base.py as of 2026). Each row is off by the
ratio of the two norms.

The LoRA of a transformer has the prefix ``diffusion_model.``, diffusers' names of modules, and an alpha for each; its
LoHa and LoKr have LyCORIS' keys (`kohya`).
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats import kohya
from sdtune.models.formats.diffusers_file import require_kinds
from sdtune.models.formats.keys import Place, assemble
from sdtune.models.formats.kohya import SUFFIXES
from sdtune.models.formats.names import denoiser_of, dotted, published_name, underscored
from sdtune.models.formats.neutral import AdapterFile

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
    part, name = PREFIXES[prefix], found[1]
    if part == "unet":
        part = denoiser_of(name)
        name = dotted(underscored(name)) if part == "unet" else name
    return None if name is None else (part, published_name(part, name), ENDS[found[2]])


def read(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> AdapterFile:
    return AdapterFile(assemble(path, tensors, place), metadata, "comfyui")


OWN = {
    "transformer": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
"""Beginnings of the keys of a transformer's adapter, and of the text encoders beside it."""


def tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    if not any(m.kind == "lora" for m in adapter.parts.get("transformer", {}).values()):
        return kohya.tensors(adapter)
    require_kinds(adapter, "comfyui", ("lora",))
    out: dict[str, Tensor] = {}
    for part, modules in adapter.parts.items():
        for name, module in modules.items():
            if module.magnitude is not None:
                raise UserError("--to comfyui: cannot hold DoRA beside a transformer; diffusers and peft can")
            stem = f"{OWN[part]}{name}"
            out[f"{stem}.lora_A.weight"], out[f"{stem}.lora_B.weight"] = module.tensors["down"], module.tensors["up"]
            out[f"{stem}.alpha"] = torch.tensor(float(module.alpha))
    return out


NOTE_DORA = (
    "ComfyUI divides DoRA's rows by the norm of the base, not of the changed weight: its images differ a little; "
    "with --model BASE the file is made exact for ComfyUI, and for it alone"
)
