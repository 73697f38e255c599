"""diffusers' ``pytorch_lora_weights.safetensors``.

Written as ``unet.<module>.lora.down.weight`` and ``text_encoder.text_model.<module>.lora_linear_layer.down.weight``,
with alpha = rank: readers that do not see the metadata assume that, as InvokeAI and diffusers before 0.35 do.
Read with the keys of every version: PEFT's ``lora_A``, the attention processors' ``processor.to_q_lora.down`` of
2023, and alpha from ``.alpha`` keys or from the metadata that diffusers 0.35 began to write.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats.keys import LYCORIS, Place, assemble, with_alpha
from sdtune.models.formats.names import text_encoder_name
from sdtune.models.formats.neutral import PARTS, AdapterFile, Module

SUFFIXES = LYCORIS | {
    "lora.down.weight": "lora.down",
    "lora.up.weight": "lora.up",
    "lora_linear_layer.down.weight": "lora.down",
    "lora_linear_layer.up.weight": "lora.up",
    "lora_A.weight": "lora.down",
    "lora_B.weight": "lora.up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha",
}
SUFFIX = re.compile(rf"(.+)\.({'|'.join(re.escape(s) for s in SUFFIXES)})")
PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def place(key: str) -> Place | None:
    part, _, name = key.partition(".")
    if part not in PARTS:
        part, name = "unet", key  # as `unet.save_lora_adapter` and `save_attn_procs` write
    if old := PROCESSOR.fullmatch(name):
        module, letter, end = old.groups()
        target = f"to_{letter}{'.0' * (letter == 'out')}" if part == "unet" else f"{letter}_proj"
        name, slot = f"{module}.{target}", f"lora.{end}"
    elif new := SUFFIX.fullmatch(name):
        name, slot = new[1], SUFFIXES[new[2]]
    else:
        return None
    return part, name if part == "unet" else text_encoder_name(name), slot


def read(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> AdapterFile:
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        own = {
            part: {k.removeprefix(f"{part}."): v for k, v in config.items() if k.startswith(f"{part}.")}
            for part in PARTS
        }
        own["unet"] = own["unet"] or config  # a file of the model alone, without prefixes
        parts = assemble(path, tensors, place, lambda part, name, rank: scale(own[part], name, rank))
    except (ValueError, AttributeError, TypeError, re.error) as error:
        raise UserError(f"{path}: its lora_adapter_metadata cannot be read ({error})") from None
    return AdapterFile(parts, metadata, "diffusers")


def scale(config: dict[str, Any], name: str, rank: int) -> tuple[float, int]:
    """(alpha, rank) that a PEFT config, as a dict, gives a module, with rsLoRA's root multiplied into alpha."""
    name = name.removeprefix("text_model.")

    def pick(patterns: dict[str, Any], default: Any) -> Any:
        known = ((k, v) for k, v in patterns.items() if re.match(rf"(.*\.)?({k.removeprefix('text_model.')})$", name))
        return next(known, ("", default))[1]

    r = pick(config.get("rank_pattern") or {}, config.get("r")) or rank or 1
    alpha = pick(config.get("alpha_pattern") or {}, config.get("lora_alpha", config.get("alpha"))) or r
    return float(alpha) * (r**0.5 if config.get("use_rslora") else 1), int(r)


def require_kinds(adapter: AdapterFile, to: str, kinds: tuple[str, ...]) -> None:
    """``UserError`` unless every module is of one of ``kinds``, with a magnitude for rows if any."""
    for name, module in adapter.modules().items():
        if module.kind not in kinds:
            raise UserError(f"--to {to}: cannot hold {module.kind} ({name}); kohya, comfyui and peft can")
        if module.magnitude is not None and (module.axis or module.kind != "lora"):
            what = "norms of columns" if module.axis else f"the magnitudes of a {module.kind}"
            raise UserError(f"--to {to}: cannot hold {what} ({name}); kohya and comfyui can")


def peft_magnitude(module: Module) -> Tensor | None:
    """The magnitude in PEFT's shape: (out), and (1, out, 1, 1) for a convolution."""
    if module.magnitude is None:
        return None
    ndim = module.tensors["down"].ndim
    return module.magnitude if ndim == 2 else module.magnitude.reshape(1, -1, *[1] * (ndim - 2))


def tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    require_kinds(adapter, "diffusers", ("lora",))
    out: dict[str, Tensor] = {}
    for part, modules in adapter.parts.items():
        infix = "lora" if part == "unet" else "lora_linear_layer"
        for name, module in modules.items():
            module = with_alpha(module, module.rank)
            out |= {f"{part}.{name}.{infix}.{end}.weight": t for end, t in module.tensors.items()}
            if (
                magnitude := peft_magnitude(module)
            ) is not None:  # transformers leaves it out unless it is written as a parameter
                out[f"{part}.{name}.lora_magnitude_vector{'' if part == 'unet' else '.weight'}"] = magnitude
    return out
