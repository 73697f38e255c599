"""Single-file checkpoints of Stable Diffusion 1 to 3.5 and XL: what a file holds, and its parts as diffusers' folders.

A file holds weights under the names of the original code, and neither settings nor a tokenizer; both come with sdtune
(``single_file_kinds``), so a file is read without a network. Each file is converted once, into the cache, by one of
the processes that ask for it, while the others wait. A folder gets its name when it is complete.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sdtune.config.sections import UserError
from sdtune.data import cache_root
from sdtune.models.part_files import BROKEN, reason, refuse_broken
from sdtune.models.single_file_kinds import CHECKED, PIPELINES, SETTINGS, write_settings
from sdtune.run.files import sweep_folders

UNET_PREFIX, VAE_PREFIX, TEXT_PREFIXES = (
    "model.diffusion_model.",
    "first_stage_model.",
    ("cond_stage_model.", "conditioner.", "text_encoders."),
)
STABLE_DIFFUSION_3 = {
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
"""Where a file of Stable Diffusion 3 has its text encoders; the third may be left out of a file, and of a model."""


def model_folder(file: Path) -> str:
    """A checkpoint as the folder of a pipeline; without a VAE where the file has none.

    Raises:
        UserError: the file is no whole checkpoint, or not of a kind that is known here.
    """
    where = f"--model {file}"
    names = shapes_of(file, where)
    if not any(name.startswith(UNET_PREFIX) for name in names):
        if any(name.startswith(("decoder.", VAE_PREFIX)) for name in names):
            raise UserError(f"{where}: a VAE alone, not a base model; give it as --vae")
        raise UserError(
            f"{where}: cannot be read as a single-file checkpoint: it holds no denoiser under {UNET_PREFIX}*"
        )
    kind = kind_of(file, where)
    if not any(name.startswith(TEXT_PREFIXES) for name in names):
        way_out = "give it as --unet, with a base as --model"
        if PIPELINES[kind] == "StableDiffusion3Pipeline":
            way_out = "get a file with clip_l and clip_g in it, or give a diffusers folder or Hub id of that model"
        raise UserError(f"{where}: holds no text encoder, so it is no whole base; {way_out}")
    absent = absent_parts(names, kind, where)
    import diffusers

    diffusers.utils.logging.disable_progress_bar()

    def convert(new: Path, config: Path) -> None:
        loader: Any = getattr(diffusers, PIPELINES[kind])
        without: dict[str, Any] = dict.fromkeys(absent)
        pipe = loader.from_single_file(str(file), config=str(config), local_files_only=True, **without)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                if hasattr(part, "tie_weights"):
                    part.tie_weights()
                refuse_broken(part, f"{where}: {name}")
        pipe.save_pretrained(new)

    return _converted(file, where, kind, convert)


def absent_parts(names: Iterable[str], kind: str, where: str) -> list[str]:
    """The parts of a pipeline that a file of a kind does without. Raises: UserError for one that it cannot lack."""

    def holds(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    absent = [] if holds(VAE_PREFIX) else ["vae"]
    if kind in CHECKED:
        absent.append("safety_checker")
    if PIPELINES[kind] == "StableDiffusion3Pipeline":
        lost = [part for part, prefix in STABLE_DIFFUSION_3.items() if not holds(prefix)]
        if set(lost) - {"text_encoder_3"}:
            raise UserError(
                f"{where}: holds no {STABLE_DIFFUSION_3[lost[0]].rstrip('.')}, so it is no whole base; get a file "
                "with clip_l and clip_g in it, or give a diffusers folder or Hub id of that model"
            )
        absent += [*lost, *(part.replace("text_encoder", "tokenizer") for part in lost)]
    return absent


def part_folder(file: Path, option: str, part: str, base: str | None) -> str:
    """A VAE or a UNet of a single file as a folder that ``from_pretrained`` reads.

    Args:
        part: ``vae`` or ``unet``.
        base: the pipeline folder or Hub id whose part it takes the place of, and whose settings it has; ``None`` for
            those of the kind of the file.

    Raises:
        UserError: the file holds no such part, or one of other sizes.
    """
    where = f"{option} {file}"
    names = shapes_of(file, where)
    kinds = {"vae": ("decoder.", VAE_PREFIX), "unet": (UNET_PREFIX, "input_blocks.", "down_blocks.")}
    if not any(name.startswith(kinds[part]) for name in names):
        raise UserError(f"{where}: holds no {part}; its tensors begin with {', '.join(sorted(names)[:2])}")
    import diffusers

    loader: Any = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel}[part]

    def convert(new: Path, config: Path) -> None:
        chosen = base or str(config)
        loader.from_single_file(str(file), config=chosen, subfolder=part).save_pretrained(new)

    key = hashlib.sha256(json.dumps([part, base]).encode()).hexdigest()[:8]
    return _converted(file, where, "v1", convert, f"-{part}-{key}")


def shapes_of(file: Path, where: str) -> dict[str, list[int]]:
    """The shapes of the tensors of a safetensors file. Raises: UserError where it is none, or cut short."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: not a safetensors file, or cut short ({reason(error)})") from None


def kind_of(file: Path, where: str) -> str:
    """The kind of a checkpoint, by the names and shapes of its tensors. Raises: UserError for one not known here."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shapes = shapes_of(file, where)
    channels = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", [0, 4, 0, 0])[1]
    if channels != 4:
        raise UserError(
            f"{where}: its UNet takes {channels} channels, not 4: an inpainting or editing model, not text-to-image"
        )
    try:
        kind: str = infer_diffusers_model_type({name: torch.empty(s, device="meta") for name, s in shapes.items()})
    except KeyError as error:  # some kinds are told apart by a tensor that this file lacks
        raise UserError(f"{where}: a single file of kind unknown: it lacks {error}") from None
    if kind not in SETTINGS:
        raise UserError(
            f"{where}: a single file of kind {kind}; read are those of Stable Diffusion 1 to 3.5 and XL. Give a "
            "diffusers folder or Hub id of that model"
        )
    return kind


def _converted(file: Path, where: str, kind: str, convert: Callable[[Path, Path], None], suffix: str = "") -> str:
    """The folder in the cache that ``convert(new, settings)`` fills once for a file's content.

    Raises:
        UserError: diffusers cannot convert it.
    """
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:20]
    folder = cache_root() / "models" / f"{file.stem}-{digest}{suffix}"
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _convert_into(folder, where, kind, convert)
    return str(folder)


def _convert_into(folder: Path, where: str, kind: str, convert: Callable[[Path, Path], None]) -> None:
    new = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    sweep_folders(new)
    settings = new / "settings"
    try:
        settings.mkdir(parents=True)
        write_settings(settings, kind)
        convert(new / "model", settings)
        try:
            (new / "model").rename(folder)
        except OSError:  # another machine was first
            if not folder.is_dir():
                raise
    except BROKEN as error:
        raise UserError(f"{where}: cannot be read as a single-file checkpoint: {reason(error)}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
