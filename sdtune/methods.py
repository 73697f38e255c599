"""One config class per method: the sections it reads, its own fields, and the defaults that are its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sdtune.configs import Adapter, Captions, Data, Denoising, Hub, Model, Optim, Preview, Prompts, Run


class LoraConfig(Adapter, Denoising, Model, Captions, Data, Optim, Prompts, Preview, Hub, Run):
    """Low-rank adapters on a text-to-image model (LoRA; Hu et al. 2021)."""

    method: ClassVar[str] = "lora"
    entry: ClassVar[str] = "sdtune.recipes.lora:Lora"

    output_dir: Path = Path("runs/lora")


METHODS: tuple[type[Run], ...] = (LoraConfig,)
"""The commands that train, in the order in which --help lists them."""


def config_class(settings: Mapping[str, Any]) -> type[Run]:
    """The config class of a run's ``config.yaml``; of a recipe of one's own, the one that shares most of its keys.

    The runs of a time when `method` was not written down were all LoRA.
    """
    name = settings.get("method", LoraConfig.method)
    for config in METHODS:
        if config.method == name:
            return config
    return max(METHODS, key=lambda config: len(settings.keys() & config.model_fields.keys()))


MAY_CHANGE = frozenset(
    "steps num_train_epochs output_dir dataloader_num_workers cache cache_dir gradient_checkpointing "
    "checkpointing_steps checkpoints_total_limit export_steps max_bad_steps log_steps report_to tracker_project_name "
    "train_batch_size gradient_accumulation_steps validation_prompt negative_prompt num_validation_images "
    "validation_steps validation_inference_steps validation_guidance_scale push_to_hub hub_model_id hub_private "
    "hub_revision hub_create_pr hub_strategy license".split()
)
"""What may differ when a run is continued: none of it touches an image, a draw or the mathematics of a step.

The batch may be cut differently, as long as the images per optimizer step stay the same.
"""
