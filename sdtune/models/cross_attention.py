"""Weights of the cross-attention that train beside those of the base (Custom Diffusion; Kumari et al. 2023).

They are in attention processors of diffusers, which its ``load_attn_procs`` reads again. Their gradient leaves out the
first token of a caption, which begins every caption, as the paper's code does.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from safetensors.torch import load_file
from torch import Tensor, nn

from sdtune.config.sections import UserError
from sdtune.models.formats.tensor_file import load, locate, reproducible
from sdtune.run.usage import ATTENTION

MARK = "_custom_diffusion"
"""In the name of each of these weights."""
OF_CROSS = ".attn2.processor"
"""How the names of the processors end that read the text."""


def train_cross_attention(unet: Any, all_of_it: bool) -> None:
    """Give each cross-attention of ``unet`` keys and values of its own, in fp32, which start as the base's and train.

    Args:
        all_of_it: queries and outputs as well.

    Raises:
        UserError: the network has none.
    """
    unet.requires_grad_(False)
    processors = dict(unet.attn_processors)
    for name in [name for name in processors if name.endswith(OF_CROSS)]:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        inner, width = layer.to_k.weight.shape
        with torch.device(layer.to_k.weight.device):
            own = CustomDiffusionAttnProcessor2_0(True, all_of_it, inner, width)
        taken = {f"to_k{MARK}": layer.to_k, f"to_v{MARK}": layer.to_v}
        if all_of_it:
            taken |= {f"to_q{MARK}": layer.to_q, f"to_out{MARK}.0": layer.to_out[0]}
        with torch.no_grad():
            for place, source in taken.items():
                for key, weight in source.named_parameters():
                    own.get_submodule(place).get_parameter(key).copy_(weight)
        processors[name] = own.float()
    unet.set_attn_processor(processors)


def tensors_of(unet: Any) -> dict[str, Tensor]:
    """The weights as `load_attn_procs` wants them: with an empty tensor for each processor that has none."""
    tensors: dict[str, Tensor] = {}
    for name, processor in unet.attn_processors.items():
        own = processor.state_dict() if isinstance(processor, nn.Module) else {}
        tensors |= {f"{name}.{key}": weight.detach().cpu().contiguous() for key, weight in own.items()}
        if not own:
            tensors[name] = torch.empty(0)
    return tensors


def save_cross_attention(folder: Path, unet: Any, provenance: Mapping[str, Any]) -> Path:
    """Write the weights as one file, and make sure that diffusers reads them as they are; equal ones, equal bytes."""
    path, new, tensors = folder / ATTENTION, folder / f".{ATTENTION}", tensors_of(unet)
    about = {"format": "pt", "sdtune": json.dumps(provenance, sort_keys=True)}
    new.write_bytes(reproducible(tensors, about))
    read = unet._process_custom_diffusion(load_file(new))
    for name, processor in read.items():
        for key, weight in processor.state_dict().items():
            if not torch.equal(weight, tensors[f"{name}.{key}"]):
                raise RuntimeError(f"{path}: {name}.{key} does not read back as it was trained")
    if read.keys() != unet.attn_processors.keys():
        raise RuntimeError(f"{path}: not every processor of the network is in it")
    new.replace(path)
    return path


def attention_file(where: str) -> Path | None:
    """The file of such weights in a folder, or given as itself here or on the Hub; ``None`` for anything else."""
    path = Path(where).expanduser()
    if path.is_dir():
        return path / ATTENTION if (path / ATTENTION).is_file() else None
    return locate(where, option="--adapter") if path.name == ATTENTION else None


def load_cross_attention(pipe: Any, adapters: Sequence[tuple[str, float]]) -> bool:
    """Whether ``adapters``, each with its weight, are such weights, which are then put into ``pipe``.

    Raises:
        UserError: they do not match the base, or stand beside others, whose layers they would take the place of.
    """
    found = [(where, weight, file) for where, weight in adapters if (file := attention_file(where))]
    for where, weight, file in found:
        if len(adapters) > 1 or weight != 1:
            raise UserError(
                f"--adapter {where}: weights of Custom Diffusion, which take the place of layers: they have no weight, "
                "and go with no other adapter; give it alone"
            )
        put_into(pipe, load(file)[0], f"--adapter {where}")
    return bool(found)


def put_into(pipe: Any, tensors: dict[str, Tensor], asked: str) -> None:
    """Put such weights into a pipeline, as the lines of stock diffusers do.

    Raises:
        UserError: that begins with ``asked``; they were made for another base.
    """
    unet = pipe.components.get("unet")
    own = getattr(unet, "attn_processors", {})
    if {name.partition(".processor")[0] for name in tensors} != {name.partition(".processor")[0] for name in own}:
        raise UserError(f"{asked}: made for another base: its attention layers are not those of this one")
    for name, tensor in tensors.items():
        layer, _, key = name.partition(".processor.")
        if not key:
            continue
        shape = dict(unet.get_submodule(layer).named_parameters()).get(key.replace(MARK, ""), torch.empty(0)).shape
        if shape != tensor.shape:
            shapes = ("x".join(map(str, s)) for s in (tensor.shape, shape))
            raise UserError(f"{asked}: made for another base: {name} is {' there, and '.join(shapes)} in this one")
    unet.load_attn_procs(tensors, _pipeline=pipe)
