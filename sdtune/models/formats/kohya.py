"""kohya's files (sd-scripts; LyCORIS for LoHa and LoKr), which A1111, Forge and ComfyUI read as well.

``lora_unet_<module with underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` and DoRA's ``.dora_scale``;
text encoders ``lora_te_`` in Stable Diffusion 1 and 2, ``lora_te1_`` and ``lora_te2_`` in all others; FLUX.1's
transformer as ``lora_unet_double_blocks_...`` (`kohya_flux`). Written with diffusers' module names, which all readers
know; read with sgm's ``input_blocks`` as well. LoHa and LoKr of a transformer have LyCORIS' own ``lycoris_``, which
ComfyUI knows for them too.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats import kohya_flux
from sdtune.models.formats import metadata as about
from sdtune.models.formats.keys import LYCORIS, Place, assemble, with_alpha
from sdtune.models.formats.names import denoiser_of, dotted, published_name, underscored
from sdtune.models.formats.neutral import AdapterFile, Module

PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
SUFFIXES = LYCORIS | {
    "lora_down.weight": "lora.down",
    "lora_mid.weight": "lora.mid",
    "lora_up.weight": "lora.up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
}
UNREAD = ("conv_in", "conv_out", "time_embedding")
"""Modules of the UNet that sd-scripts' own reader leaves out; it also ignores ``dora_scale``."""
BASE_NORM = "sdtune_dora_norm"
"""Metadata entry of a file whose DoRA is divided by the norm of the base's rows, for ComfyUI alone."""
ENDS = {slot: end for end, slot in SUFFIXES.items()}


def place(key: str) -> Place | None:
    stem, _, end = key.partition(".")
    prefix = next((p for p in PREFIXES if stem.startswith(p)), None)
    if prefix == "lora_unet_" and end in SUFFIXES and (name := kohya_flux.dotted(stem.removeprefix(prefix))):
        return "transformer", name, SUFFIXES[end]
    if prefix is None or end not in SUFFIXES or (name := dotted(stem.removeprefix(prefix))) is None:
        return None
    part = denoiser_of(name) if PREFIXES[prefix] == "unet" else PREFIXES[prefix]
    return part, published_name(part, name), SUFFIXES[end]


def read(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> AdapterFile:
    parts = assemble(path, tensors, place)
    if own := parts.get("transformer"):
        flux = {name: module for name, module in own.items() if kohya_flux.is_kohya(name)}
        try:
            # What LyCORIS names by diffusers' modules is there already
            parts["transformer"] = {n: m for n, m in own.items() if n not in flux} | kohya_flux.apart(flux)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    if metadata.get(BASE_NORM) == "base":
        parts = {part: {n: with_base_norm(m) for n, m in own.items()} for part, own in parts.items()}
    return AdapterFile(parts, metadata, "kohya")


def with_base_norm(module: Module) -> Module:
    return module if module.magnitude is None or module.axis else replace(module, base_norm=True)


def tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    parts, transformer = dict(adapter.parts), adapter.parts.get("transformer")
    has_lora = transformer is not None and any(m.kind == "lora" for m in transformer.values())
    if transformer and has_lora:
        if not (flux := kohya_flux.joined(transformer)):
            raise UserError(
                "--to kohya: of transformers it has a layout for the LoRA of FLUX.1 and Chroma alone, told by their "
                "single blocks; diffusers, comfyui and peft have one for this adapter"
            )
        parts["transformer"] = flux
    te = "lora_te1_" if transformer or about.is_sdxl(adapter) else "lora_te_"
    prefixes = {"unet": "lora_unet_", "transformer": "lora_unet_" if has_lora else "lycoris_"}
    prefixes |= {"text_encoder": te, "text_encoder_2": "lora_te2_"}
    out: dict[str, Tensor] = {}
    for part, modules in parts.items():
        for name, module in common_alpha(modules).items():
            stem = f"{prefixes[part]}{underscored(name)}"
            out |= {f"{stem}.{ENDS[f'{module.kind}.{n}']}": t for n, t in module.tensors.items()}
            out[f"{stem}.alpha"] = torch.tensor(float(module.alpha))
            if module.magnitude is not None:
                ones = [1] * (module.tensors["down"].ndim - 2) if module.kind == "lora" else []
                out[f"{stem}.dora_scale"] = module.magnitude.reshape(*(1, -1) if module.axis else (-1, 1), *ones)
    return out


def common_alpha(modules: dict[str, Module]) -> dict[str, Module]:
    """Each module with an alpha that readers scale rightly.

    diffusers 0.42 gives all LoRA modules of a part the most frequent alpha: here they get one alpha, and the rest is
    multiplied into their weights. A LoKr of two full matrices is scaled by 1.
    """
    alphas = [m.alpha for m in modules.values() if m.kind == "lora"]
    common = max(sorted(set(alphas)), key=alphas.count, default=1.0)
    scaled = {}
    for name, module in modules.items():
        full = module.kind == "lokr" and {"w1", "w2"} <= module.tensors.keys()
        scaled[name] = with_alpha(module, common if module.kind == "lora" else module.rank if full else module.alpha)
    return scaled
