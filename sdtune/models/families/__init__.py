"""Base models. A family is a plain object that knows one kind: its parts, its conditioning, its objective.

It is not an ``nn.Module``, so that only what a recipe assigns to itself is trained and checkpointed.
"""

import difflib
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdtune.config.sections import UserError
from sdtune.diffusion.objective import Objective
from sdtune.models.part_files import check_settings, parse_index, reason

BUILT_IN = ("tiny", "tiny-flow")
"""Bases that come with the package, named without a folder."""
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

CLASSES = {
    "StableDiffusionPipeline": "sdtune.models.families.stable_diffusion:StableDiffusion",
    "StableDiffusionInpaintPipeline": ("sdtune.models.families.stable_diffusion_inpainting:StableDiffusionInpainting"),
    "StableDiffusionXLInpaintPipeline": (
        "sdtune.models.families.stable_diffusion_xl_inpainting:StableDiffusionXLInpainting"
    ),
    "StableDiffusionUpscalePipeline": "sdtune.models.families.stable_diffusion_upscale:StableDiffusionUpscale",
    "StableDiffusionXLPipeline": "sdtune.models.families.stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusionXLImg2ImgPipeline": "sdtune.models.families.stable_diffusion_xl_refiner:StableDiffusionXLRefiner",
    "StableDiffusion3Pipeline": "sdtune.models.families.stable_diffusion_3:StableDiffusion3",
    "ZImagePipeline": "sdtune.models.families.z_image:ZImage",
    "Flux2Pipeline": "sdtune.models.families.flux_2:Flux2",
    "Flux2KleinPipeline": "sdtune.models.families.flux_2_klein:Flux2Klein",
    "FluxPipeline": "sdtune.models.families.flux:Flux",
    "FluxKontextPipeline": "sdtune.models.families.flux_kontext:FluxKontext",
    "ChromaPipeline": "sdtune.models.families.chroma:Chroma",
    "QwenImagePipeline": "sdtune.models.families.qwen_image:QwenImage",
}
"""Pipeline class of a published model to the family that knows it."""


class Family(Protocol):
    """What recipes need to know of a base model."""

    objective: Objective
    denoiser: nn.Module
    text_encoder: nn.Module
    latent_channels: int
    downscale: int
    """Pixels of an image per element of a latent, along a side."""
    resolution: int
    """Side in pixels of the images that the base was made for."""

    @property
    def tokenizer(self) -> Any: ...
    def moments(self, pixels: Tensor) -> Tensor: ...
    def latents(self, batch: Mapping[str, Tensor]) -> Tensor: ...
    def conditioning(self, batch: Mapping[str, Tensor]) -> Any: ...
    def predict(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor: ...
    def pipeline(self) -> Any: ...
    def fp32_pipeline(self) -> Any: ...
    def unload_frozen(self) -> None: ...


def resolve_model(name: str) -> str:
    """What ``from_pretrained`` takes: a Hub id, or a folder that has been seen to hold a pipeline.

    Raises:
        UserError: for a pickle, a missing folder, or a folder that holds no pipeline.
    """
    if name in BUILT_IN:
        return str(Path(__file__).parents[2] / "assets" / name)
    path = Path(name).expanduser()
    if path.suffix in PICKLES:
        raise UserError(
            f"--model {name}: a pickle can run code when it is read; convert it once with diffusers' "
            "convert_original_stable_diffusion_to_diffusers.py --to_safetensors, on a machine you can spare"
        )
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"--model {name}: no model_index.json in that folder, so it is not a diffusers pipeline")
        return str(path)
    if path.is_file() and path.suffix == ".safetensors":
        if any(mark in key for key in tensor_names(path) for mark in ("lora", "hada_", "lokr_")):
            raise UserError(f"--model {name}: an adapter, not a base model; to sample with it, give --adapter {name}")
        from sdtune.models import single_file

        return single_file.model_folder(path)
    if path.exists() or name.count("/") != 1 or name[0] in "./~":
        near = [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, [*BUILT_IN, *near], n=1)
        raise UserError(
            f"--model {name}: no such folder or .safetensors file"
            + (f"; did you mean {close[0]}?" if close else "; a Hub id is written user/name")
        )
    return name


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file, or cut short ({error})") from None


def part_location(name: str, option: str, part: str, base: str | None) -> tuple[str, str | None]:
    """Where another VAE or UNet lies: ``(folder or Hub id, subfolder)``.

    Args:
        name: a folder of the part or of a pipeline, a single ``.safetensors`` file, or a Hub id.
        base: the folder or Hub id of the pipeline whose part it takes the place of.

    Raises:
        UserError: for a pickle, and for a folder that holds neither.
    """
    path = Path(name).expanduser()
    if path.suffix in PICKLES:
        raise UserError(f"{option} {name}: a pickle can run code when it is read; only .safetensors is read")
    if path.is_file():
        from sdtune.models import single_file

        return single_file.part_folder(path, option, part, base), None
    if path.is_dir():
        for subfolder in (None, part):
            if (path / (subfolder or "") / "config.json").is_file():
                return str(path), subfolder
        raise UserError(f"{option} {name}: no config.json in that folder, nor in a folder {part} in it")
    if name.count("/") != 1 or name[0] in "./~":
        raise UserError(f"{option} {name}: no such folder or .safetensors file; a Hub id is written user/name")
    return name, None


def model_index(source: str, cfg: Any) -> dict[str, Any]:
    """The ``model_index.json`` of a folder or Hub repository; `UserError` when it cannot be had or is damaged."""
    if Path(source).is_dir():
        index = _parsed_index(Path(source) / "model_index.json", source)
        check_settings(Path(source), index, f"--model {source}")
        return index
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(source, "model_index.json", revision=cfg.revision, cache_dir=cfg.cache_dir)
    except LocalEntryNotFoundError:
        raise UserError(f"--model {source}: not in the Hub cache, and the Hub cannot be reached") from None
    except EntryNotFoundError:
        raise UserError(f"--model {source}: that repository holds no model_index.json, so no pipeline") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"--model {source}: {str(error).splitlines()[0]}") from None
    return _parsed_index(Path(file), source)


def _parsed_index(file: Path, source: str) -> dict[str, Any]:
    where = f"--model {source}"
    try:
        return parse_index(file.read_text(encoding="utf-8"), where)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: its model_index.json cannot be read as text ({reason(error)})") from None


def load(cfg: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The family of ``cfg.model``, its denoiser on ``device`` in ``dtype``; other parts come when first used."""
    source = resolve_model(cfg.model)
    index = model_index(source, cfg)
    kind = index.get("_class_name", "")
    if kind not in CLASSES:
        raise UserError(f"--model {cfg.model}: a {kind or 'model of unknown kind'}; known are {', '.join(CLASSES)}")
    return family_class(kind)(cfg, source, index, device, dtype)


def family_class(pipeline_class: str) -> Any:
    """The family of a pipeline class by its name, also of the one that follows an image with the same base.

    One that no family knows is guided as Stable Diffusion is.
    """
    kind = re.sub(r"(ControlNet|Adapter)Pipeline$", "Pipeline", pipeline_class)
    module, _, name = CLASSES.get(kind, CLASSES["StableDiffusionPipeline"]).partition(":")
    return getattr(importlib.import_module(module), name)


def silence_libraries() -> None:
    """Turn off the progress bars and hints of diffusers and transformers (a missing torchvision, a shard written)."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
