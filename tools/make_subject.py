"""Draws the example subjects, five captioned images each: one that the base `tiny` has never seen, and one it has.

python tools/make_subject.py sdtune/assets

The first, the heart, is for methods that train weights. The second, the arrow, is for textual inversion, which can only
find what the base is able to draw; its captions do not say what it is.
"""

import json
import sys
from pathlib import Path

import numpy as np

from sdtune.data import toy_world

SHOWN = (
    ("big", "red", "white"),
    ("small", "yellow", "blue"),
    ("big", "black", "pink"),
    ("small", "white", "green"),
    ("big", "purple", "gray"),
)
"""Size, colour and ground of each image; three colours and the black ground are left for prompts."""


def make_subject(folder: Path, shape: str) -> None:
    """The images, each with a caption of a rare word (``text``) and of one that textual inversion adds (``word``)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    lines = []
    for k, (size, colour, ground) in enumerate(SHOWN):
        scene = toy_world.random_scene(rng, (shape,), held_out=None)
        while (scene.size, scene.colour, scene.ground) != (size, colour, ground):
            scene = toy_world.random_scene(rng, (shape,), held_out=None)
        sides = (92, 80) if k % 2 else (80, 92)  # leaves a random crop some room
        toy_world.render(scene, *sides).save(folder / f"{k}.png")
        caption = f"a {size} {colour} {{}} on a {ground} background"
        row = {"file_name": f"{k}.png", "text": caption.format("sks shape"), "word": caption.format("<thing>")}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_subject(Path(sys.argv[1]) / "tiny-subject", "heart")
    make_subject(Path(sys.argv[1]) / "tiny-word", "arrow")
