"""The autoencoder (VAE) that is trained: that of a base, another one, or a new one from a file of settings."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from sdtune.config.sections import UserError
from sdtune.models import families
from sdtune.models.part_files import BROKEN, ConfigOnly, has_part, read_part, reason

KIND = "AutoencoderKL"


def read_autoencoder(cfg: Any, device: torch.device) -> AutoencoderKL:
    """The autoencoder of ``cfg``, in fp32; with ``--vae-config`` of random weights, on the meta device shapes alone.

    Args:
        cfg: a config with the section Model, and ``vae_config``.

    Raises:
        UserError: it cannot be read, is of another class, or does not take RGB.
    """
    families.silence_libraries()
    if cfg.vae_config:
        vae = _made(_described(cfg.vae_config), f"--vae-config {cfg.vae_config}", device)
    else:
        asked, source, where = _place(cfg)
        config = dict(read_part(ConfigOnly(AutoencoderKL), source, asked, **where))
        if config.get("_class_name", KIND) != KIND:
            raise UserError(f"{asked}: a {config['_class_name']}; only an {KIND} is trained")
        if device.type == "meta":
            vae = _made(config, asked, device)
        else:
            vae = read_part(AutoencoderKL, source, asked, dtype=torch.float32, variant=_variant(cfg), **where)
    if vae.config.in_channels != 3 or vae.config.out_channels != 3:
        raise UserError(f"--vae {cfg.vae or cfg.model}: takes {vae.config.in_channels} channels, and images have 3")
    return vae


def downscale(vae: AutoencoderKL) -> int:
    """Pixels of an image per element of a latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _variant(cfg: Any) -> str | None:
    """Of the base's files; another VAE is read as it is."""
    return None if cfg.vae else cfg.variant


def _place(cfg: Any) -> tuple[str, str, dict[str, Any]]:
    """How an error names it, its folder or Hub id, and where it is in that."""
    cache = {"cache_dir": cfg.cache_dir}
    if cfg.vae:
        folder, subfolder = families.part_location(cfg.vae, "--vae", "vae", None)
        return f"--vae {cfg.vae}", folder, cache | ({"subfolder": subfolder} if subfolder else {})
    path = Path(cfg.model).expanduser()
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        raise UserError(
            f"--model {cfg.model}: no pipeline but a part of one; a VAE alone is given as --vae {cfg.model}"
        )
    source = families.resolve_model(cfg.model)
    if not has_part(families.model_index(source, cfg), "vae"):
        raise UserError(f"--model {cfg.model}: holds no VAE; give one with --vae")
    return f"--model {cfg.model}: vae", source, cache | {"subfolder": "vae", "revision": cfg.revision}


def _described(file: Path) -> dict[str, Any]:
    """The settings in a file, or in the folder of a VAE or of a pipeline."""
    inside = [file / "config.json", file / "vae" / "config.json"] if file.is_dir() else [file]
    path = next((p for p in inside if p.is_file()), inside[0])
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "; of a model on the Hub, download its config.json"
        raise UserError(f"--vae-config {path}: {error.strerror}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--vae-config {path}: not JSON ({reason(error)})") from None
    if not isinstance(found, dict) or found.get("_class_name", KIND) != KIND or "block_out_channels" not in found:
        raise UserError(f"--vae-config {path}: wants the config.json of an {KIND}, with its block_out_channels")
    return found


def _made(config: dict[str, Any], asked: str, device: torch.device) -> AutoencoderKL:
    try:
        with torch.device(device if device.type == "meta" else "cpu"):
            vae: AutoencoderKL = AutoencoderKL.from_config(config)
    except BROKEN as error:
        raise UserError(f"{asked}: {reason(error)}") from None
    return vae
