"""What a file says about itself: the ``ss_*`` and ``modelspec.*`` entries that kohya's tools and UIs show."""

import json
from collections import Counter
from typing import Any

from sdtune.conversion.formats.neutral import AdapterFile

STALE = ("lora_adapter_metadata", "format", "sshs_", "modelspec.hash", "modelspec.thumbnail")
"""Starts of entries that describe the tensors of one file and no other."""


def kept(adapter: AdapterFile) -> dict[str, str]:
    """The entries that stay true in another format."""
    return {k: v for k, v in adapter.metadata.items() if not k.startswith(STALE)}


def provenance(adapter: AdapterFile) -> dict[str, Any]:
    """How sdtune says that the adapter was trained; empty if it does not."""
    try:
        told = json.loads(adapter.metadata.get("sdtune", "{}"))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def base_of(adapter: AdapterFile) -> str | None:
    return provenance(adapter).get("base") or adapter.metadata.get("ss_sd_model_name") or None


def is_sdxl(adapter: AdapterFile) -> bool:
    """Whether the base is an SDXL: two text encoders, or more than one transformer block in a row."""
    version = adapter.metadata.get("ss_base_model_version", "") or adapter.metadata.get("modelspec.architecture", "")
    return (
        "text_encoder_2" in adapter.parts
        or any(".transformer_blocks.1." in name for name in adapter.parts.get("unet", {}))
        or "xl" in version
        or "stable-diffusion-xl" in str(base_of(adapter))
    )


def kohya(adapter: AdapterFile) -> dict[str, str]:
    """The minimum that sd-scripts writes, with the run's facts as far as they are known."""
    modules = list(adapter.modules().values())
    told, kinds = provenance(adapter), adapter.kinds
    rank = Counter(m.rank for m in modules).most_common(1)[0][0]
    alpha = Counter(m.alpha for m in modules).most_common(1)[0][0]
    plain = {m.kind for m in modules} == {"lora"} and "dora" not in kinds
    args = {} if plain else {"algo": next(iter({"dora": "lora"}.get(k, k) for k in kinds)), "dora_wd": "dora" in kinds}
    architecture = "stable-diffusion-xl-v1-base" if is_sdxl(adapter) else "stable-diffusion-v1"
    made = {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0" if is_sdxl(adapter) else "sd_v1",
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(args, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/{'lora' if plain else 'lycoris'}",
        "modelspec.implementation": "diffusers",
    }
    facts = {
        "ss_sd_model_name": told.get("base"),
        "ss_seed": told.get("seed"),
        "ss_steps": told.get("steps"),
        "ss_learning_rate": told.get("learning_rate"),
        "ss_output_name": told.get("name"),
        "modelspec.title": told.get("name"),
        "modelspec.trigger_phrase": told.get("trigger"),
        "modelspec.resolution": f"{told['resolution']}x{told['resolution']}" if "resolution" in told else None,
    }
    return {k: str(v) for k, v in facts.items() if v is not None} | kept_first(kept(adapter), made)


def kept_first(kept: dict[str, str], made: dict[str, str]) -> dict[str, str]:
    """What the file said itself wins, but for what conversion may have changed."""
    changed = {"ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
    return made | kept | {k: v for k, v in made.items() if k in changed}
