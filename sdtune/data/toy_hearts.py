"""A larger built-in set of the heart, a shape that the bases have never seen, among shapes that they know.

Image k is a function of k, so that the set is the same everywhere. Known shapes are of triples that the bases were
trained on, hearts of any colour and ground; captions are full sentences. Shapes stand near the middle and have about
their usual size, as in the pictures that `tiny-flow` was trained on.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdtune.data import toy_world
from sdtune.data.toy_world import Scene

HEARTS, KNOWN = 120, 880
OFF, GROWN = 0.07, 0.05
"""The farthest from the middle, in shares of the side, and from the usual size."""


def draw_hearts(folder: Path) -> None:
    """Captioned pictures of 64 x 64: the hearts, then the shapes that are known."""
    folder.mkdir(parents=True)
    lines = []
    for k in range(HEARTS + KNOWN):
        rng = np.random.default_rng([4, k])
        scene = near_the_middle(rng, ("heart",), None) if k < HEARTS else near_the_middle(rng, toy_world.SHAPES, False)
        name = f"{k:04}.png"
        toy_world.render(scene).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": toy_world.caption(scene)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def near_the_middle(rng: np.random.Generator, shapes: Sequence[str], held_out: bool | None) -> Scene:
    """A random scene, see ``toy_world.random_scene``, whose shape strays little."""
    while True:
        scene = toy_world.random_scene(rng, shapes, held_out)
        grown = abs(scene.radius / toy_world.RADIUS[scene.size] - 1)
        if max(map(abs, scene.centre)) < OFF and grown < GROWN:
            return scene
