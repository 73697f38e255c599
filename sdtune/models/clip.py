"""The CLIP that is trained: one of transformers that is continued, or a new one; and the folder that it is saved in."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

from sdtune.config.methods.clip import ClipConfig
from sdtune.config.sections import UserError
from sdtune.diffusion.guides import NOISED, knows_noise
from sdtune.models import families
from sdtune.models.part_files import read_part
from sdtune.models.pipeline_folder import forget_machine, save_tables, verify_module, write_folder
from sdtune.models.vision import load_pretrained

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on (Radford et al. 2021, published code), which a new one is told too."""
HEAD = 32
"""Channels of an attention head of a new CLIP."""


class Clip(NamedTuple):
    """A model with its tokenizer, and the mean and standard deviation by which it scales pixels in [0, 1]."""

    model: Any
    tokenizer: Any
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def side(self) -> int:
        side: int = self.model.config.vision_config.image_size
        return side

    @property
    def window(self) -> int:
        """Tokens of a caption that are read, with the special ones."""
        window: int = self.model.config.text_config.max_position_embeddings
        return window


def read_clip(cfg: ClipConfig, device: torch.device) -> Clip:
    """The CLIP of ``cfg``, in fp32; on the meta device shapes alone.

    Raises:
        UserError: it cannot be read, is of another class, or sees pictures of another size.
    """
    families.silence_libraries()
    if cfg.model is None:
        return new_clip(cfg, device)
    where = f"--model {cfg.model}"
    found = load_pretrained(cfg.model, "--model")
    if not isinstance(found.model, CLIPModel):
        raise UserError(f"{where}: a {type(found.model).__name__}; only a CLIPModel is trained")
    tokenizer = read_part(AutoTokenizer, cfg.model, f"{where}: tokenizer")
    mean, std = (tuple(values.flatten().tolist()) for values in (found.mean, found.std))
    clip = Clip(found.model.float().to(device), tokenizer, mean, std)
    if clip.side != cfg.resolution:
        raise UserError(f"--resolution {cfg.resolution}: this CLIP sees pictures of {clip.side}; give that number")
    return clip


def new_clip(cfg: ClipConfig, device: torch.device) -> Clip:
    """Of random weights. Raises: UserError if patches do not fill a picture, or the tokenizer cannot be read."""
    if cfg.resolution % cfg.patch_size:
        raise UserError(f"--patch-size {cfg.patch_size}: does not divide --resolution {cfg.resolution}")
    folder = Path(families.resolve_model(cfg.tokenizer) if cfg.tokenizer in families.BUILT_IN else cfg.tokenizer)
    inside = folder / "tokenizer"
    source = str(inside) if inside.is_dir() else str(cfg.tokenizer)
    tokenizer = read_part(CLIPTokenizer, source, f"--tokenizer {cfg.tokenizer}")
    tower = {
        "hidden_size": cfg.hidden_size,
        "intermediate_size": 4 * cfg.hidden_size,
        "num_attention_heads": cfg.hidden_size // HEAD,
        "projection_dim": cfg.projection_dim,
    }
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config=tower
        | special
        | {
            "num_hidden_layers": cfg.text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
        },
        vision_config=tower
        | {"num_hidden_layers": cfg.image_layers, "image_size": cfg.resolution, "patch_size": cfg.patch_size},
        projection_dim=cfg.projection_dim,
    )
    with torch.device(device if device.type == "meta" else "cpu"):
        return Clip(CLIPModel(config), tokenizer)


def save_clip(out: Path, clip: Clip, noised: bool = False) -> list[Path]:
    """Write model, tokenizer and the settings of the image processor to folder ``out``; the paths of all its files.

    Args:
        noised: whether it was trained on noised pictures, which its configuration then says.

    Raises:
        RuntimeError: what was written does not read back as it is; ``out`` is as it was.
    """
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": clip.side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": clip.side, "width": clip.side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(clip.mean),
        "image_std": list(clip.std),
    }

    if noised or knows_noise(clip.model):
        setattr(clip.model.config, NOISED, noised)

    def save(new: Path) -> None:
        clip.model.save_pretrained(new)
        clip.tokenizer.save_pretrained(new)
        save_tables(clip.tokenizer, new)
        (new / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")
        forget_machine(new)
        verify_module(new, clip.model)

    return write_folder(out, save)
