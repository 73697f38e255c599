"""PEFT adapters on a model's own modules: add, save in diffusers' layout, load, verify.

The file is ``pytorch_lora_weights.safetensors`` with diffusers' key names
(``unet.<module>.lora.down.weight``, ``transformer.<module>.lora_A.weight``,
``text_encoder.text_model.<module>.lora_linear_layer.down.weight``). Rank and alpha of each part stand in its metadata,
since a reader without them takes alpha = rank.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from sdtune.config.sections import Adapter, UserError
from sdtune.models.formats import diffusers_file
from sdtune.models.formats.tensor_file import FILE, reproducible

# peft 0.15 refuses a LoraConfig with keys that it does not know; these it does.
PORTABLE = "r lora_alpha target_modules rank_pattern alpha_pattern use_rslora use_dora lora_bias bias".split()


def add_adapter(model: nn.Module, cfg: Adapter, targets: list[str], what: str) -> None:
    """Freeze ``model``, and put a trainable adapter in fp32 on the modules that ``targets`` name.

    A single target with a character that no module name has is a regular expression for the full name. Adapters are
    fp32 whatever the precision of the base, because fp16 updates of fp16 weights would round to nothing.
    """
    pattern: str | list[str] = targets
    if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        pattern = targets[0]
    try:
        adapter = LoraConfig(
            r=cfg.rank,
            lora_alpha=cfg.alpha or cfg.rank,
            lora_dropout=cfg.dropout,
            target_modules=pattern,
            use_dora=cfg.use_dora,
            use_rslora=cfg.use_rslora,
            init_lora_weights="gaussian",
        )
        model.requires_grad_(False)
        model.add_adapter(adapter)
    except (ValueError, re.error) as error:
        ends = (re.search(r"[^.]*[a-z][^.]*(\.\d+)*$", n) for n, m in model.named_modules() if is_target(m))
        names = [name for name, _ in Counter(end.group() for end in ends if end).most_common(12)]
        raise UserError(
            f"--target-modules {' '.join(targets)}: matches no linear or convolution layer of the {what} "
            f"({type(error).__name__}); there are {', '.join(names)}, ..."
        ) from None
    cast_training_params(model, torch.float32)


def is_target(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def peft_state(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def adapter_state(part: str, model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter of ``model`` under the key names of the published file."""
    down, up = diffusers_file.KEYS.get(part, diffusers_file.OF_TEXT)
    state = {}
    for name, tensor in peft_state(model, adapter).items():
        if part.startswith("text_encoder"):
            # transformers 5.6 dropped the level `text_model.`, which other readers want
            name = f"text_model.{name.removeprefix('text_model.')}"
            if name.endswith("lora_magnitude_vector"):
                name += ".weight"  # transformers passes over a DoRA magnitude without it
        name = name.replace("lora_A", down).replace("lora_B", up)
        state[f"{part}.{name}"] = tensor.detach().cpu().contiguous()
    return state


def adapter_config(part: str, model: Any, adapter: str = "default") -> dict[str, Any]:
    full = model.peft_config[adapter].to_dict()
    kept = {k: full[k] for k in PORTABLE if full.get(k) not in (None, {}, False, "none")}
    return {f"{part}.{k}": sorted(v) if isinstance(v, set | list) else v for k, v in kept.items()}


def save_adapter(folder: Path, parts: Mapping[str, nn.Module], provenance: Mapping[str, Any], loader: Any) -> Path:
    """Write the adapters of ``parts`` (``unet``, ``text_encoder``) and make sure that they load as they are.

    The same content gives the same bytes, so that two runs can be compared by a checksum.

    Args:
        loader: the stock pipeline class whose ``load_lora_weights`` will read the file.
    """
    tensors = {k: v for part, model in parts.items() for k, v in adapter_state(part, model).items()}
    config = {k: v for part, model in parts.items() for k, v in adapter_config(part, model).items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(config, sort_keys=True),
        "sdtune": json.dumps(provenance, sort_keys=True),
    }
    path, new = folder / FILE, folder / f".{FILE}"
    new.write_bytes(reproducible(tensors, metadata))
    verify(new, parts, loader)
    new.replace(path)
    return path


def verify(path: Path, parts: Mapping[str, nn.Module], loader: Any) -> None:
    """Load the file as a reader would, and compare every tensor and scale with the adapter that was saved."""
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
            want, got = adapter_state(part, model), adapter_state(part, model, "check")
            wrong = [k for k in want if k not in got or not torch.equal(want[k].to(got[k].dtype), got[k])]
            scales = [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
            same_scale = all(s["check"] == s["default"] for s in scales)
            (model.delete_adapters if hasattr(model, "delete_adapters") else model.delete_adapter)("check")
            model.set_adapter("default")
            model.train(was_training)
            if wrong or not same_scale:
                raise RuntimeError(f"{path}: the adapter of {part} does not read back as it was trained: {wrong[:3]}")
