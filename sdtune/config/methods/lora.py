"""Options of `sdtune lora`."""

from pathlib import Path
from typing import ClassVar

from sdtune.config.sections import (
    Adapter,
    BaseOptions,
    Captions,
    Data,
    Denoising,
    Hub,
    Latents,
    Masks,
    Model,
    Optim,
    Preview,
    Prompts,
    Run,
    Streaming,
)


class LoraConfig(
    Adapter, Denoising, BaseOptions, Model, Captions, Masks, Latents, Streaming, Data, Optim, Prompts, Preview, Hub, Run
):
    """Low-rank adapters on a text-to-image model (LoRA; Hu et al. 2021)."""

    method: ClassVar[str] = "lora"
    entry: ClassVar[str] = "sdtune.recipes.lora:Lora"
    examples: ClassVar[str] = r"""
    sdtune lora --dataset tiny-hearts --steps 20
    sdtune lora --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset photos --resolution 512 --rank 8 --mixed-precision bf16
    sdtune lora --config lora/tiny-hearts --num-processes 2
    """

    output_dir: Path = Path("runs/lora")
