"""Networks that follow an image, beside a base: ControlNet and T2I-Adapter, read from files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import nn

from sdtune.config.sections import UserError
from sdtune.data.images import decode
from sdtune.models import families
from sdtune.models.part_files import read_part, reason
from sdtune.run.usage import CONTROLS

OF_UNETS = ("cross_attention_dim", "addition_embed_type", "block_out_channels")
OF_TRANSFORMERS = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
"""Settings in which a ControlNet agrees with its base."""


class Controls(NamedTuple):
    """What a pipeline needs in order to follow images."""

    pipeline_class: Any
    parts: dict[str, Any]


def read_control(family: Any, kind: str, where: str, option: str) -> nn.Module:
    """A network of class ``kind`` to train on; on the meta device its shapes alone.

    Raises:
        UserError: it cannot be read, or was made for another base.
    """
    asked, cache_dir = f"{option} {where}", family.cfg.cache_dir
    if (found := control_class(where, asked, cache_dir)) != kind:
        raise UserError(f"{asked}: a {found}, not a {kind}")
    network_class = getattr(diffusers, kind)
    if family.device.type == "meta":
        with torch.device("meta"):
            network = network_class.from_config(network_class.load_config(where, cache_dir=cache_dir))
    else:
        network = read_part(network_class, where, asked, cache_dir=cache_dir)
    check_control(network, family.denoiser.config, asked, family.cfg.model)
    return network


def read_image(file: Path, asked: str) -> Image.Image:
    """An image to follow or to edit, in RGB. Raises: UserError that begins with ``asked``."""
    try:
        return decode(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{asked}: cannot be read ({error})") from None


def read_controls(where: list[str], base_class: str, dtype: torch.dtype, cache_dir: Path | None) -> Controls:
    """The networks of ``--control``, and the pipeline that follows them.

    Args:
        base_class: class of the base's pipeline.

    Raises:
        UserError: one cannot be read, is no such network, or they are of two kinds.
    """
    kinds = [control_class(name, f"--control {name}", cache_dir) for name in where]
    if len(set(kinds)) > 1:
        raise UserError(f"--control: {' and '.join(sorted(set(kinds)))} cannot be followed at once; give one kind")
    name, kind = CONTROLS[kinds[0]], getattr(diffusers, kinds[0])
    pipeline_class = families.family_class(base_class).control_pipelines.get(name)
    if pipeline_class is None or base_class not in families.CLASSES:
        raise UserError(f"--control {where[0]}: a {kinds[0]} does not go with a {base_class}")
    networks = [read_part(kind, folder, f"--control {folder}", dtype=dtype, cache_dir=cache_dir) for folder in where]
    if len(networks) == 1:
        return Controls(pipeline_class, {name: networks[0]})
    return Controls(pipeline_class, {name: diffusers.MultiAdapter(networks) if name == "adapter" else networks})


def plain(setting: Any) -> Any:
    """A setting as JSON has it."""
    return list(setting) if isinstance(setting, tuple) else setting


def control_class(where: str, asked: str, cache_dir: Path | None) -> str:
    """The class of the network in a folder or Hub repository. Raises: UserError if it is no control network."""
    try:
        file = Path(where, "config.json")
        if not file.parent.is_dir():
            file = Path(hf_hub_download(where, "config.json", cache_dir=cache_dir))
        kind = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, HfHubHTTPError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{asked}: no folder or repository of a ControlNet or T2I-Adapter ({reason(error)})") from None
    if kind not in CONTROLS:
        raise UserError(f"{asked}: a {kind}; known are {', '.join(CONTROLS)}")
    return str(kind)


def check_controls(pipe: Any, where: Sequence[str], base: str) -> None:
    """Raises: UserError for a network of a pipeline that was made for another base."""
    several = pipe.components.get("controlnet") or pipe.components["adapter"]
    if isinstance(several, diffusers.MultiAdapter):
        networks = list(several.adapters)
    else:  # the class for several has another name for each base
        networks = [several] if type(several).__name__ in CONTROLS else list(several.nets)
    denoiser = pipe.components[families.family_class(type(pipe).__name__).denoiser_name]
    for network, asked in zip(networks, where, strict=True):
        check_control(network, denoiser.config, f"--control {asked}", base)


def check_control(network: Any, denoiser: Mapping[str, Any], where: str, base: str) -> None:
    """Raises: UserError for a network that was made for another denoiser than the one with these settings."""
    own = network.config
    if isinstance(network, diffusers.T2IAdapter):
        widths = list(denoiser["block_out_channels"])
        pairs = {"channels": (list(own["channels"])[: len(widths)], widths)}
    else:
        names = OF_UNETS if isinstance(network, diffusers.ControlNetModel) else OF_TRANSFORMERS
        pairs = {name: (plain(own.get(name)), plain(denoiser.get(name))) for name in names}
    for name, (theirs, own) in pairs.items():
        if theirs != own:
            raise UserError(f"{where}: made for another base: its {name} is {theirs}, that of {base} is {own}")
