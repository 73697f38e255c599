"""diffusers' ``pytorch_lora_weights.safetensors``.

Written as ``unet.<module>.lora.down.weight``, ``transformer.<module>.lora_A.weight`` and
``text_encoder.text_model.<module>.lora_linear_layer.down.weight``, with alpha = rank: readers that do not see the
metadata assume that, as InvokeAI and diffusers before 0.35 do. Read with the keys of every version: PEFT's ``lora_A``,
the attention processors' ``processor.to_q_lora.down`` of 2023, and alpha from ``.alpha`` keys or from the metadata that
diffusers 0.35 began to write.
"""

import re
from pathlib import Path

from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.formats.keys import LYCORIS, Place, assemble, with_alpha
from sdtune.models.formats.names import denoiser_of, published_name
from sdtune.models.formats.neutral import DENOISERS, PARTS, AdapterFile, Module
from sdtune.models.formats.peft_settings import Scales, errors_of, settings_of, targets_of

KEYS = {"unet": ("lora.down", "lora.up"), "transformer": ("lora_A", "lora_B"), "prior": ("lora_A", "lora_B")}
"""What the two factors of a module of the denoiser, or of a prior, are called."""
OF_TEXT = ("lora_linear_layer.down", "lora_linear_layer.up")
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
        part, name = denoiser_of(key), key  # as `unet.save_lora_adapter` and `save_attn_procs` write
    if old := PROCESSOR.fullmatch(name):
        module, letter, end = old.groups()
        target = f"to_{letter}{'.0' * (letter == 'out')}" if part == "unet" else f"{letter}_proj"
        name, slot = f"{module}.{target}", f"lora.{end}"
    elif new := SUFFIX.fullmatch(name):
        name, slot = new[1], SUFFIXES[new[2]]
    else:
        return None
    return part, published_name(part, name), slot


def read(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> AdapterFile:
    config = settings_of(f"{path}: lora_adapter_metadata", metadata.get("lora_adapter_metadata", "{}"))
    own = {
        part: {k.removeprefix(f"{part}."): v for k, v in config.items() if k.startswith(f"{part}.")} for part in PARTS
    }
    for part in DENOISERS:
        own[part] = own[part] or config  # a file of the model alone, without prefixes
    scales = {part: Scales(settings) for part, settings in own.items()}
    with errors_of(f"{path}: lora_adapter_metadata"):
        parts = assemble(path, tensors, place, lambda part, name, rank: scales[part](name, rank))
    targets = {part: found for part, settings in own.items() if (found := targets_of(settings))}
    return AdapterFile(parts, metadata, "diffusers", targets=targets)


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
        down, up = KEYS.get(part, OF_TEXT)
        for name, module in modules.items():
            module = with_alpha(module, module.rank)
            out[f"{part}.{name}.{down}.weight"] = module.tensors["down"]
            out[f"{part}.{name}.{up}.weight"] = module.tensors["up"]
            if (
                magnitude := peft_magnitude(module)
            ) is not None:  # transformers leaves it out unless it is written as a parameter
                out[f"{part}.{name}.lora_magnitude_vector{'' if part in DENOISERS else '.weight'}"] = magnitude
    return out
