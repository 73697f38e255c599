"""PEFT adapters on a model's own modules: add, save, load, verify.

The file is ``pytorch_lora_weights.safetensors``; that of a LoRA has diffusers' key names
(``unet.<module>.lora.down.weight``, ``transformer.<module>.lora_A.weight``,
``text_encoder.text_model.<module>.lora_linear_layer.down.weight``). Rank and alpha of each part stand in its metadata,
since a reader without them takes alpha = rank. LoHa and LoKr, which diffusers cannot hold, have LyCORIS' layout.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from diffusers.training_utils import cast_training_params
from peft import PeftType, get_peft_model_state_dict
from torch import Tensor, nn

from sdtune.config.sections import Adapter, UserError
from sdtune.models.adapter_kinds import (
    check_names,
    check_start,
    drawn_alike,
    is_target,
    modules_of,
    peft_config,
    without_start,
    write_lycoris,
)
from sdtune.models.formats import diffusers_file
from sdtune.models.formats.tensor_file import FILE, reproducible

# peft 0.15 refuses a LoraConfig with keys that it does not know; these it does.
PORTABLE = "r lora_alpha target_modules rank_pattern alpha_pattern use_rslora use_dora lora_bias bias".split()


def add_adapter(model: nn.Module, cfg: Adapter, targets: list[str], what: str) -> dict[str, Tensor]:
    """Freeze ``model``, and put a trainable adapter in fp32 on the modules that ``targets`` name.

    A single target with a character that no module name has is a regular expression for the full name. Adapters are
    fp32 whatever the precision of the base, because fp16 updates of fp16 weights would round to nothing.

    Returns:
        The adapter as it starts where that was taken out of the base's weights (PiSSA, OLoRA); else nothing.
    """
    pattern: str | list[str] = targets
    if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        pattern = targets[0]
    try:
        if cfg.starts_from_base:
            check_start(model, cfg, pattern)
        if model.device.type == "meta":  # there are no weights to start from
            cfg = cfg.model_copy(update={"init_lora_weights": "gaussian"})
        config = peft_config(cfg, pattern)
        model.requires_grad_(False)
        with drawn_alike(model.device) if cfg.starts_from_base else nullcontext():
            model.add_adapter(config)
    except (ValueError, re.error) as error:
        ends = (re.search(r"[^.]*[a-z][^.]*(\.\d+)*$", n) for n, m in model.named_modules() if is_target(m))
        names = [name for name, _ in Counter(end.group() for end in ends if end).most_common(12)]
        raise UserError(
            f"--target-modules {' '.join(targets)}: matches no linear or convolution layer of the {what} "
            f"({type(error).__name__}); there are {', '.join(names)}, ..."
        ) from None
    check_names(model, what)
    cast_training_params(model, torch.float32)
    return {name: t.detach().cpu().clone() for name, t in peft_state(model).items()} if cfg.starts_from_base else {}


def peft_state(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def adapter_state(part: str, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a LoRA, which go by PEFT's names, under the key names of the published file."""
    down, up = diffusers_file.KEYS.get(part, diffusers_file.OF_TEXT)
    state = {}
    for name, tensor in factors.items():
        if part.startswith("text_encoder"):
            # transformers 5.6 dropped the level `text_model.`, which other readers want
            name = f"text_model.{name.removeprefix('text_model.')}"
            if name.endswith("lora_magnitude_vector"):
                name += ".weight"  # transformers passes over a DoRA magnitude without it
        name = name.replace("lora_A", down).replace("lora_B", up)
        state[f"{part}.{name}"] = tensor.detach().cpu().contiguous()
    return state


def adapter_config(part: str, model: Any, doubled: bool = False) -> dict[str, Any]:
    """Rank, alpha and targets as a file's metadata has them; ``doubled`` for twice the rank at the same scale."""
    full = model.peft_config["default"].to_dict()
    if doubled:
        scale = full["lora_alpha"] / (full["r"] ** 0.5 if full["use_rslora"] else full["r"])
        full |= {"r": 2 * full["r"], "lora_alpha": 2 * full["r"] * scale, "use_rslora": False}
    kept = {k: full[k] for k in PORTABLE if full.get(k) not in (None, {}, False, "none")}
    return {f"{part}.{k}": sorted(v) if isinstance(v, set | list) else v for k, v in kept.items()}


Starts = Mapping[str, Mapping[str, Tensor]]
"""Part to what its adapter started as, where that was taken out of the base (`add_adapter`)."""


def save_adapter(
    folder: Path, parts: Mapping[str, Any], provenance: Mapping[str, Any], loader: Any, starts: Starts
) -> Path:
    """Write the adapters of ``parts`` (``unet``, ``text_encoder``) and make sure that they load as they are.

    The same content gives the same bytes, so that two runs can be compared by a checksum.

    Args:
        loader: the stock pipeline class whose ``load_lora_weights`` will read the file of a LoRA.
        starts: what has to be subtracted, so that the file applies to the base as it is published.
    """
    path, new = folder / FILE, folder / f".{FILE}"
    about = {"sdtune": json.dumps(provenance, sort_keys=True)}
    factors = {part: peft_state(model) for part, model in parts.items()}
    if any(model.peft_config["default"].peft_type != PeftType.LORA for model in parts.values()):
        write_lycoris(new, {part: modules_of(part, model, factors[part]) for part, model in parts.items()}, about)
        new.replace(path)
        return path
    factors = {part: without_start(own, starts[part]) if starts.get(part) else own for part, own in factors.items()}
    tensors = {part: adapter_state(part, own) for part, own in factors.items()}
    config = {k: v for p, model in parts.items() for k, v in adapter_config(p, model, bool(starts.get(p))).items()}
    about |= {"format": "pt", "lora_adapter_metadata": json.dumps(config, sort_keys=True)}
    new.write_bytes(reproducible({k: v for own in tensors.values() for k, v in own.items()}, about))
    verify(new, parts, tensors, loader)
    new.replace(path)
    return path


def verify(path: Path, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], loader: Any) -> None:
    """Load the file of a LoRA as a reader would; compare it with ``tensors``, and each scale with the adapter's."""
    # Pipelines with a UNet return network alphas as well, which a file with metadata does not have
    state, *alphas, metadata = loader.lora_state_dict(path.parent, weight_name=path.name, return_lora_metadata=True)
    given: dict[str, Any] = {"network_alphas": alphas[0] if alphas else None, "adapter_name": "check"}
    given["metadata"] = metadata
    with catch_warnings(action="ignore", category=UserWarning):  # peft warns of the second adapter, which is intended
        for part, model in parts.items():
            was_training = model.training
            if part.startswith("text_encoder"):
                loader.load_lora_into_text_encoder(state, text_encoder=model, prefix=part, **given)
            else:
                model.load_lora_adapter(state, prefix=part, **given)
            want, got = tensors[part], adapter_state(part, peft_state(model, "check"))
            wrong = [k for k in want if k not in got or not torch.equal(want[k].to(got[k].dtype), got[k])]
            scales = [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
            same_scale = all(math.isclose(s["check"], s["default"], rel_tol=1e-9) for s in scales)
            (model.delete_adapters if hasattr(model, "delete_adapters") else model.delete_adapter)("check")
            model.set_adapter("default")
            model.train(was_training)
            if wrong or not same_scale:
                raise RuntimeError(f"{path}: the adapter of {part} does not read back as it was trained: {wrong[:3]}")
