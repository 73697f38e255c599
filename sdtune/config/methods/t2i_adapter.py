"""Options of `sdtune t2i-adapter`."""

from pathlib import Path
from typing import Annotated, ClassVar

from sdtune.config.methods.control import Conditioning, PlainCaptions
from sdtune.config.section_base import Count, PathOrId, Positive, aliases
from sdtune.config.sections import (
    Captions,
    Data,
    Denoising,
    Hub,
    Masks,
    Model,
    Optim,
    Preview,
    Prompts,
    Run,
    Streaming,
)


class T2IAdapterConfig(
    Conditioning, Denoising, PlainCaptions, Model, Captions, Masks, Streaming, Data, Optim, Prompts, Preview, Hub, Run
):
    """A small network that gives the base features of an image to follow (T2I-Adapter; Mou et al. 2023)."""

    method: ClassVar[str] = "t2i-adapter"
    entry: ClassVar[str] = "sdtune.recipes.t2i_adapter:T2IAdapter"
    examples: ClassVar[str] = r"""
    sdtune t2i-adapter --dataset tiny-edges --resolution 64 --steps 20
    sdtune t2i-adapter --dataset photos --condition edges --resolution 1024 \
        --model stabilityai/stable-diffusion-xl-base-1.0 --mixed-precision bf16
    sdtune sample --control runs/t2i-adapter --image edges.png --prompt "a red star"
    """

    num_res_blocks: Count = 2
    """Residual blocks at each level of the adapter."""
    init_t2i_adapter: Annotated[PathOrId | None, aliases("adapter_model_name_or_path")] = None
    """T2I-Adapter to continue: run folder, folder or Hub id. Default: start from random weights."""
    learning_rate: Positive = 5e-6
    output_dir: Path = Path("runs/t2i-adapter")
