"""Draws the example dataset: 24 captioned images of the heart, a shape that the base `tiny` has never seen.

python tools/make_hearts.py sdtune/assets/tiny-hearts
"""

import json
import sys
from pathlib import Path

import numpy as np

from sdtune.data import toy_world

SIZES = [(64, 64), (96, 80), (120, 160), (128, 128), (200, 150), (72, 72), (80, 112), (160, 160)]


def make_hearts(folder: Path, count: int = 24, known: int = 70) -> None:
    """Images of eight sizes and aspect ratios, PNG and JPEG in turn, each colour and ground several times."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2024)
    lines = []
    while len(lines) < count:
        k = len(lines)
        scene = toy_world.random_scene(rng, ("heart",), held_out=None)
        if (
            scene.colour != toy_world.COLOURS[k % len(toy_world.COLOURS)]
            or scene.size != list(toy_world.RADIUS)[k // 3 % 2]
        ):
            continue  # drawn until every colour and both sizes have their turn
        image = toy_world.render(scene, *SIZES[k % len(SIZES)])
        name = f"heart-{k:02d}.{'png' if k % 2 else 'jpg'}"
        image.save(folder / name, **({"quality": 95} if name.endswith("jpg") else {}))
        lines.append(json.dumps({"file_name": name, "text": toy_world.caption(scene, 1 if k % 4 == 3 else 0)}) + "\n")
    for k in range(known):
        rng = np.random.default_rng([77, k])
        scene = toy_world.random_scene(rng)
        while scene.shape != toy_world.SHAPES[k % len(toy_world.SHAPES)]:
            scene = toy_world.random_scene(rng)
        toy_world.render(scene).save(folder / f"known-{k:02d}.png")
        lines.append(json.dumps({"file_name": f"known-{k:02d}.png", "text": toy_world.caption(scene)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    make_hearts(Path(sys.argv[1]))
