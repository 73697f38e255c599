"""Bases of full size with random weights, and pictures to train them on: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from family_memory import SHAPES, write_base

from sdtune.data import toy_world

NAMES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL", "sd3": "Stable Diffusion 3.5 medium"}
"""The shapes by their names in bench/family_shapes.json."""
PIXELS = {"tiny": 64, "tiny-sdxl": 64, "tiny-sd3": 64, "sd15": 512, "sdxl": 1024, "sd3": 1024}
"""Pixels a side that each is made for."""
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP["projection_dim"] = 32
VAE = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SMALLER: dict[str, dict[str, dict[str, Any]]] = {
    "tiny-sdxl": {"text_encoder": CLIP, "text_encoder_2": CLIP, "vae": VAE},
    "tiny-sd3": {"text_encoder": CLIP, "text_encoder_2": CLIP, "vae": VAE},
}
SMALLER["tiny-sdxl"]["unet"] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "layers_per_block": 1,
    "sample_size": 32,
}
SMALLER["tiny-sd3"]["transformer"] = {
    "sample_size": 32,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "joint_attention_dim": 64,
    "num_layers": 2,
    "pos_embed_max_size": 32,
    "dual_attention_layers": [0],
}
T5 = {"vocab_size": 1000, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4}
SMALLER["tiny-sd3"]["text_encoder_3"] = T5
"""What small stand-ins change in the parts of the base of full size."""


def shape_of(name: str) -> dict[str, Any]:
    """The class and the parts of a base, as bench/family_shapes.json has them."""
    shape: dict[str, Any] = json.loads(SHAPES.read_text(encoding="utf-8"))[NAMES[name.removeprefix("tiny-")]]
    for part, changed in SMALLER.get(name, {}).items():
        shape["parts"][part][2] |= changed
    return shape


def configurations(name: str, folder: Path) -> str:
    """A base without weights in ``folder``; what ``--model`` is given."""
    if name == "tiny":
        return name
    return str(write_base(folder, shape_of(name)))


def base(name: str, work: Path) -> str:
    """A base with random weights, made once; what ``--model`` is given. SD 1.5's takes 4 GB in fp32."""
    folder = work / name
    if name == "tiny" or (folder / "complete").exists():
        return name if name == "tiny" else str(folder)
    torch.manual_seed(0)
    shape = shape_of(name)
    write_base(folder, shape)
    for part, (library, kind, config) in shape["parts"].items():
        if part != "scheduler":
            module: Any = (
                getattr(diffusers, kind).from_config(config)
                if library == "diffusers"
                else getattr(transformers, kind)(getattr(transformers, kind).config_class(**config))
            )
            module.save_pretrained(folder / part)
    (folder / "complete").touch()
    return str(folder)


def pictures(folder: Path, count: int, side: int) -> Path:
    """Pictures of the toy world, as PNG, each with a caption of its own; those that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "metadata.jsonl").exists():
        lines = []
        for k in range(count):
            scene = toy_world.random_scene(np.random.default_rng(k))
            toy_world.render(scene, side, side).save(folder / f"{k}.png")
            lines.append(json.dumps({"file_name": f"{k}.png", "text": f"{toy_world.caption(scene)}, {k}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
