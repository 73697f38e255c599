"""Reads the parts of a base model, and refuses files that are incomplete, damaged, pickles, or not what they claim.

diffusers leaves a tensor that its file lacks on the meta device, transformers fills it with random numbers, and neither
looks for NaN; schedulers make tables as long as their configuration says.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sdtune.config.sections import UserError
from sdtune.run.processes import LOADER_DIED

MOST_TIMESTEPS = 100_000
"""More than any published model has, and a table of that many is small."""
SETTINGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")
"""Files of which a part of a pipeline has one."""
BROKEN = (Exception,)
"""What the libraries raise for a configuration or weights that they cannot use: errors of many kinds."""


def reason(error: BaseException) -> str:
    """The first line of what a library says, or the name of its error.

    Raises:
        RuntimeError: torch's own, that a loader worker has died: it comes wherever the main thread is just then.
    """
    if isinstance(error, RuntimeError) and LOADER_DIED.match(str(error)):
        raise error
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class ConfigOnly:
    """Stands in for a class of diffusers, so that the configuration of a part is read without its weights."""

    def __init__(self, kind: Any):
        self.from_pretrained = kind.load_config


def read_part(kind: Any, source: str, where: str, **options: Any) -> Any:
    """What ``kind.from_pretrained(source, **options)`` gives, with every tensor of a module accounted for.

    Args:
        kind: a model, tokenizer or configuration of diffusers or transformers, or an ``AutoModel`` of transformers.
        where: the option, its value and the part, with which an error begins.

    Raises:
        UserError: a tensor is missing or holds NaN or infinity; a pickle; anything that the library cannot use.
    """
    is_module = isinstance(kind, type) and (issubclass(kind, nn.Module) or kind.__name__.startswith("AutoModel"))
    more = {"output_loading_info": True, "use_safetensors": True} if is_module else {}
    try:
        found = kind.from_pretrained(source, **options, **more)
    except BROKEN as error:
        raise UserError(f"{where}: {_pickle(source, options) or reason(error)}") from None
    if not is_module:
        return found
    module, info = found
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{where}: {len(missing)} of {len(module.state_dict())} tensors are missing from its file "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); get it again"
        )
    refuse_broken(module, where)
    return module


def _pickle(source: str, options: Mapping[str, Any]) -> str | None:
    """Why a part was not read, where its folder holds nothing but pickles."""
    folder = Path(source, options.get("subfolder") or "")
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return "a pickle, which can run code when it is read; only .safetensors is read"
    return None


def refuse_broken(module: nn.Module, where: str) -> None:
    """Refuse a module that holds a tensor of which the file had nothing, or a number that is not finite.

    Raises:
        UserError: names the tensors, and counts their bad numbers.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if missing := [name for name, tensor in tensors.items() if tensor.device.type == "meta"]:
        raise UserError(f"{where}: {len(missing)} tensors are missing from its file ({missing[0]}); get it again")
    bad = {
        name: int((~tensor.isfinite()).sum())
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    }
    if bad:
        name, count = next(iter(bad.items()))
        raise UserError(
            f"{where}: {sum(bad.values()):,} numbers in {len(bad)} tensors are NaN or infinite "
            f"(first {name}, {count:,} of them); it would spoil every image, so get it again"
        )


def read_scheduler(kind: Any, source: str, where: str, changed: Mapping[str, Any] = {}, **options: Any) -> Any:
    """A scheduler of diffusers, made from its configuration with some settings changed.

    Raises:
        UserError: the configuration cannot be read or used.
    """
    try:
        config = dict(kind.load_config(source, **options))
    except BROKEN as error:
        raise UserError(f"{where}: {reason(error)}") from None
    check_scheduler(config, where)
    try:
        return kind.from_config(config, **changed)
    except BROKEN as error:
        raise UserError(f"{where}: {reason(error)}") from None


def check_scheduler(config: Mapping[str, Any], where: str) -> None:
    """Raises: UserError for a schedule of no steps, or of so many that its tables would fill the memory."""
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 1 <= steps <= MOST_TIMESTEPS:
        raise UserError(f"{where}: num_train_timesteps is {steps!r}, not a number from 1 to {MOST_TIMESTEPS}")


def check_tokenizer(tokenizer: Any, config: Any, where: str) -> None:
    """Refuse a tokenizer whose tokens, or whose window, exceed the tables of its text encoder.

    Args:
        config: of the text encoder.

    Raises:
        UserError: with both numbers.
    """
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, its text encoder {config.vocab_size}; "
            "they are not of one model"
        )
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise UserError(
            f"{where}: the tokenizer takes {tokenizer.model_max_length} tokens at a time, its text encoder "
            f"{config.max_position_embeddings}; set model_max_length in tokenizer_config.json"
        )


def has_part(index: Mapping[str, Any], part: str) -> bool:
    """Whether a ``model_index.json`` names a part, and not as absent."""
    named = index.get(part)
    return isinstance(named, list) and named[0] is not None


def check_channels(unet: Mapping[str, Any], vae: Mapping[str, Any], where: str, kind: str = "") -> None:
    """Raises: UserError for a UNet that takes other channels than a pipeline of class ``kind`` gives it."""
    latent = vae["latent_channels"]
    beside = {"InstructPix2Pix": latent, "Inpaint": latent + 1, "Upscale": 3}
    given = latent + next((more for name, more in beside.items() if name in kind), 0)
    if unet["in_channels"] != given:
        raise UserError(
            f"{where}: its UNet takes {unet['in_channels']} channels, its VAE gives {vae['latent_channels']}: "
            "an inpainting or editing model, not text-to-image"
        )


def check_settings(folder: Path, index: Mapping[str, Any], where: str) -> None:
    """Look at the settings of each part of a pipeline folder, of which the libraries say little that helps.

    Raises:
        UserError: settings that are no table, or latents that are scaled by what no image survives.
    """
    for part in (name for name in index if has_part(index, name)):
        for file in SETTINGS:
            if not (folder / part / file).is_file():
                continue
            try:
                settings = json.loads((folder / part / file).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"{where}: {part}/{file} is not JSON ({reason(error)})") from None
            if not isinstance(settings, dict):
                raise UserError(f"{where}: {part}/{file} is a {type(settings).__name__}, not a table of settings")
            scale = settings.get("scaling_factor")
            if part == "vae" and not (scale is None or (isinstance(scale, int | float) and 0 < scale < float("inf"))):
                raise UserError(f"{where}: {part}/{file}: scaling_factor is {scale!r}, not a number above 0")


def parse_index(text: str, where: str) -> dict[str, Any]:
    """A ``model_index.json``: the class of the pipeline, and of each part ``[library, class]``.

    Raises:
        UserError: it is something else.
    """
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: model_index.json is not JSON ({reason(error)})") from None
    if not isinstance(index, dict):
        raise UserError(f"{where}: model_index.json is a {type(index).__name__}, not a table of parts")
    kind = index.get("_class_name", "")
    if not isinstance(kind, str):
        raise UserError(f"{where}: model_index.json names its class as {kind!r}, not as that of a pipeline")
    for name, part in index.items():
        pair = isinstance(part, list) and len(part) == 2 and all(p is None or isinstance(p, str) for p in part)
        if isinstance(part, list) and not pair:
            raise UserError(f"{where}: model_index.json names {name} as {part!r}, not as [library, class]")
    return index
