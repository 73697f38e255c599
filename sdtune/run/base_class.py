"""The class of a base model's pipeline, as its files on this machine say."""

import json
from pathlib import Path
from typing import Any

from sdtune.run.public_name import may_be_hub_id
from sdtune.run.usage import single_file_class

BUILT_IN = {"tiny": "StableDiffusionPipeline", "tiny-flow": "ZImagePipeline"}


def pipeline_class(model: str, revision: str | None, cache_dir: Any) -> str:
    """From its ``model_index.json``, or the tensors of a single file; empty where it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if model in BUILT_IN:
        return BUILT_IN[model]
    path = Path(model).expanduser()
    if path.suffix == ".safetensors":
        return single_file_class(path)
    file: Any = path / "model_index.json"
    if not path.is_dir() and may_be_hub_id(model):
        file = try_to_load_from_cache(model, file.name, cache_dir, revision)
    try:
        return str(json.loads(Path(file).read_text(encoding="utf-8")).get("_class_name", ""))
    except (TypeError, OSError, ValueError, RecursionError):
        return ""
