"""Options of `sdtune controlnet`."""

from pathlib import Path
from typing import Annotated, ClassVar

from sdtune.config.methods.control import Conditioning, PlainCaptions
from sdtune.config.section_base import Count, Natural, PathOrId, Positive, aliases
from sdtune.config.sections import (
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


class ControlNetConfig(
    Conditioning,
    Denoising,
    PlainCaptions,
    Model,
    Captions,
    Masks,
    Streaming,
    Latents,
    Data,
    Optim,
    Prompts,
    Preview,
    Hub,
    Run,
):
    """A copy of the base's encoder that follows an image, such as edges (ControlNet; Zhang et al. 2023)."""

    method: ClassVar[str] = "controlnet"
    entry: ClassVar[str] = "sdtune.recipes.controlnet:ControlNet"
    examples: ClassVar[str] = r"""
    sdtune controlnet --dataset tiny-edges --steps 20
    sdtune controlnet --dataset photos --condition edges --resolution 512 \
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed-precision bf16
    sdtune sample --control runs/controlnet --image edges.png --prompt "a red star"
    """

    init_controlnet: Annotated[PathOrId | None, aliases("controlnet_model_name_or_path")] = None
    """ControlNet to continue: run folder, folder or Hub id. Default: start from the base's own weights."""
    num_layers: Annotated[Count | None, aliases("num_double_layers")] = None
    """Blocks of a transformer that are copied. Leave out for half of those of Stable Diffusion 3, or 4 of FLUX.1."""
    num_single_layers: Natural | None = None
    """Single blocks of FLUX.1 that are copied. Leave out for 4."""
    learning_rate: Positive = 5e-6
    output_dir: Path = Path("runs/controlnet")
