"""The metadata of a file: the ``ss_*`` and ``modelspec.*`` entries that kohya's tools and UIs show."""

import json
from collections import Counter
from typing import Any

from sdtune.models.formats.neutral import AdapterFile
from sdtune.models.formats.tensor_file import json_object

ARCHITECTURE = ("ss_base_model_version", "modelspec.architecture")
"""Entries that name the kind of base."""
STALE = ("lora_adapter_metadata", "sdtune_dora_norm", "format", "sshs_", "modelspec.hash", "modelspec.thumbnail")
"""Prefixes of entries that describe the tensors of one file, so they are not copied to another."""


def lasting(adapter: AdapterFile) -> dict[str, str]:
    """The entries that are still true in another format."""
    return {k: v for k, v in adapter.metadata.items() if not k.startswith(STALE)}


def provenance(adapter: AdapterFile) -> dict[str, Any]:
    """sdtune's record of how the adapter was trained; empty if there is none."""
    return json_object(adapter.metadata.get("sdtune"))


def base_of(adapter: AdapterFile) -> str | None:
    base = provenance(adapter).get("base")
    return (base if isinstance(base, str) else None) or adapter.metadata.get("ss_sd_model_name") or None


def is_sdxl(adapter: AdapterFile) -> bool:
    """Whether the base is an SDXL: it has two text encoders, or more than one transformer block in a row."""
    version = adapter.metadata.get("ss_base_model_version", "") or adapter.metadata.get("modelspec.architecture", "")
    return (
        "text_encoder_2" in adapter.parts
        or any(".transformer_blocks.1." in name for name in adapter.parts.get("unet", {}))
        or "xl" in version
        or "stable-diffusion-xl" in str(base_of(adapter))
    )


def kohya(adapter: AdapterFile) -> dict[str, str]:
    """The entries that sd-scripts always writes, and the run's facts where they are known."""
    modules = list(adapter.modules().values())
    record, kinds = provenance(adapter), adapter.kinds
    rank = Counter(m.rank for m in modules).most_common(1)[0][0]
    alpha = Counter(m.alpha for m in modules).most_common(1)[0][0]
    lora_only = {m.kind for m in modules} == {"lora"} and "dora" not in kinds
    args = (
        {} if lora_only else {"algo": next(iter({"dora": "lora"}.get(k, k) for k in kinds)), "dora_wd": "dora" in kinds}
    )
    architecture = "stable-diffusion-xl-v1-base" if is_sdxl(adapter) else "stable-diffusion-v1"
    own = {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0" if is_sdxl(adapter) else "sd_v1",
        "ss_network_module": "networks.lora" if lora_only else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(args, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/{'lora' if lora_only else 'lycoris'}",
        "modelspec.implementation": "diffusers",
    }
    if "transformer" in adapter.parts:  # these tools know no name for it
        own = {name: value for name, value in own.items() if name not in ("ss_v2", *ARCHITECTURE)}
    facts = {
        "ss_sd_model_name": record.get("base"),
        "ss_seed": record.get("seed"),
        "ss_steps": record.get("steps"),
        "ss_learning_rate": record.get("learning_rate"),
        "ss_output_name": record.get("name"),
        "modelspec.title": record.get("name"),
        "modelspec.trigger_phrase": record.get("trigger"),
        "modelspec.resolution": f"{record['resolution']}x{record['resolution']}" if "resolution" in record else None,
    }
    return {k: str(v) for k, v in facts.items() if v is not None} | merged_entries(lasting(adapter), own)


def merged_entries(lasting: dict[str, str], own: dict[str, str]) -> dict[str, str]:
    """The file's entries win over ``own``, except those that a conversion may have changed."""
    changed = {"ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
    return own | lasting | {k: v for k, v in own.items() if k in changed}
