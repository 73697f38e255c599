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
PIXELS = {"tiny": 64, "sd15": 512, "sdxl": 1024, "sd3": 1024}
"""Pixels a side that each is made for."""


def configurations(name: str, folder: Path) -> str:
    """A base without weights in ``folder``; what ``--model`` is given."""
    if name == "tiny":
        return name
    return str(write_base(folder, json.loads(SHAPES.read_text(encoding="utf-8"))[NAMES[name]]))


def base(name: str, work: Path) -> str:
    """A base with random weights, made once; what ``--model`` is given. SD 1.5's takes 4 GB in fp32."""
    folder = work / name
    if name == "tiny" or (folder / "complete").exists():
        return name if name == "tiny" else str(folder)
    torch.manual_seed(0)
    shape = json.loads(SHAPES.read_text(encoding="utf-8"))[NAMES[name]]
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
