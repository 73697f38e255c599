"""PEFT's own layout: a folder per part, each with ``adapter_model.safetensors`` and ``adapter_config.json``.

    PeftModel.from_pretrained(pipe.unet, OUT, subfolder="unet")

Keys are ``base_model.model.<module>.lora_A.weight``; LoHa and LoKr have LyCORIS's names for their tensors.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats.diffusers_file import SUFFIX, SUFFIXES, peft_magnitude, require_kinds
from sdtune.models.formats.keys import LYCORIS, Place, assemble
from sdtune.models.formats.names import denoiser_of, published_name
from sdtune.models.formats.neutral import AdapterFile, Module
from sdtune.models.formats.peft_settings import Scales

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
ENDS = {slot: end for end, slot in LYCORIS.items()} | {"lora.down": "lora_A.weight", "lora.up": "lora_B.weight"}


def place(key: str, part: str | None) -> Place | None:
    found = SUFFIX.fullmatch(key.removeprefix(PREFIX))
    if found is None or not key.startswith(PREFIX):
        return None
    name = found[1]
    if part is None:
        part = "text_encoder" if ".self_attn." in name or ".mlp." in name else denoiser_of(name)
    return part, published_name(part, name), SUFFIXES[found[2]]


def read(
    path: Path, part: str | None, tensors: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, dict[str, Module]]:
    """The modules of one folder's file; with ``part`` None the names say which part."""
    if config.get("peft_type") not in ("LORA", "LOHA", "LOKR"):
        raise UserError(f"{path}: PEFT's {config.get('peft_type')}; sdtune reads LORA, LOHA and LOKR")
    if config.get("bias", "none") != "none" or config.get("lora_bias") or config.get("modules_to_save"):
        raise UserError(f"{path}: it trained biases or complete modules, which no other format can hold")
    scales = Scales(config)
    return assemble(path, tensors, lambda key: place(key, part), lambda _, name, rank: scales(name, rank))


def tensors(part: str, modules: dict[str, Module]) -> dict[str, Tensor]:
    """The keys of one part's file."""
    out: dict[str, Tensor] = {}
    flat = part == "text_encoder" and flat_text_encoder()
    for name, module in modules.items():
        stem = f"{PREFIX}{name.removeprefix('text_model.') if flat else name}"
        out |= {f"{stem}.{ENDS[f'{module.kind}.{n}']}": t for n, t in module.tensors.items()}
        if (magnitude := peft_magnitude(module)) is not None:
            out[f"{stem}.lora_magnitude_vector"] = magnitude
    return out


def config(part: str, modules: dict[str, Module], base: str | None) -> tuple[dict[str, Any], dict[str, Module]]:
    """The ``adapter_config.json`` of one part, and its modules with the ranks that the config gives them."""
    require_kinds(AdapterFile({part: modules}), "peft", ("lora", "loha", "lokr"))
    kinds = {m.kind for m in modules.values()}
    if len(kinds) > 1:
        raise UserError(
            f"--to peft: it holds one kind in a part, not {' and '.join(sorted(kinds))} in {part}; kohya holds both"
        )
    kind = kinds.pop()
    own: dict[str, Any] = {}
    if kind == "lora":
        dora = {m.magnitude is not None for m in modules.values()}
        if len(dora) > 1:
            raise UserError(f"--to peft: it holds DoRA in all modules of {part} or in none; kohya holds both")
        own = {"use_dora": dora.pop(), "use_rslora": False, "bias": "none", "lora_dropout": 0.0}
    else:
        own["use_effective_conv2d"] = any({"t1", "t2"} & m.tensors.keys() for m in modules.values())
    if kind == "lokr":
        modules, factors = peft_factors(part, modules)
        own |= factors
    names = {name: name.removeprefix("text_model.") for name in modules}  # the ends match with the level and without
    rank = Counter(m.rank for m in modules.values()).most_common(1)[0][0]
    alpha = Counter(m.alpha for m in modules.values()).most_common(1)[0][0]
    own |= {
        "peft_type": kind.upper(),
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha" if kind == "lora" else "alpha": number(alpha),
        "rank_pattern": {names[n]: m.rank for n, m in sorted(modules.items()) if m.rank != rank},
        "alpha_pattern": {names[n]: number(m.alpha) for n, m in sorted(modules.items()) if m.alpha != alpha},
        "target_modules": sorted(names.values()),
    }
    return own, modules


def number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def peft_factors(part: str, modules: dict[str, Module]) -> tuple[dict[str, Module], dict[str, Any]]:
    """The modules with the ranks, and the two options, from which PEFT derives the shapes of their factors.

    Raises:
        UserError: PEFT factors these sizes in another way.
    """
    both = any("w1_a" in m.tensors for m in modules.values())
    tried = sorted({-1, *(side for m in modules.values() for side in first_factor(m))})
    for factor in tried:
        tried_modules = {name: refactored(m, factor, both) for name, m in modules.items()}
        if None not in tried_modules.values():
            return {n: m for n, m in tried_modules.items() if m}, {"decompose_factor": factor, "decompose_both": both}
    raise UserError(f"--to peft: PEFT factors the LoKr of {part} into other shapes; kohya and comfyui hold these")


def first_factor(module: Module) -> tuple[int, int]:
    """Rows and columns of the first factor."""
    t = module.tensors
    return tuple(t["w1"].shape) if "w1" in t else (t["w1_a"].shape[0], t["w1_b"].shape[1])  # type: ignore[return-value]


def refactored(module: Module, factor: int, both: bool) -> Module | None:
    """``module`` with a rank for which PEFT factors it into the same shapes; None if there is no such rank."""
    from peft.tuners.lokr.layer import factorization

    t, (a, b) = module.tensors, first_factor(module)
    c = t["w2"].shape[0] if "w2" in t else t["w2_a"].shape[1 if "t2" in t else 0]
    width = t["w2"].shape[1] if "w2" in t else t["w2_b"].shape[1]
    kernels = (1,) if "w2" in t or "t2" in t else (1, 9)  # the kernel of a 3x3 convolution does not show otherwise
    for d in (width // k for k in kernels if width % k == 0):
        if factorization(a * c, factor) != (a, c) or factorization(b * d, factor) != (b, d):
            continue
        second_half, first_half = -(-max(c, d) // 2), -(-max(a, b) // 2)
        free = not {"w1_a", "w2_a"} & t.keys()
        rank = (
            max(module.rank, second_half, first_half if both else 1)
            if free
            else module.tensors["w2_b" if "w2_b" in t else "w1_b"].shape[0]
        )
        if ("w2" in t) == (rank >= max(c, d) / 2) and ("w1" in t) == (not both or rank >= max(a, b) / 2):
            return replace(module, rank=rank, alpha=module.scale * rank)
    return None


def flat_text_encoder() -> bool:
    """Whether the installed transformers has dropped the level ``text_model`` of ``CLIPTextModel`` (5.6 did).

    PEFT needs the names of the model in memory, so a file is written for the installed transformers.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(vocab_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    return not hasattr(model, "text_model")
