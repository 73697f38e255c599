"""Built-in datasets drawn from the toy world: pictures with their edges, pictures before an edit, and all its shapes.

Image k is a function of k, so that the sets are the same everywhere. The pairs show no shape that the base has never
seen (``NEW_SHAPES``), nor a triple that it was not trained on.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdtune.data import toy_world
from sdtune.data.conditions import edges
from sdtune.data.toy_world import Scene

EDGES, EDITS, ALL_SHAPES, CAPTIONED = 800, 700, 1200, 20000
"""How many pictures, or pairs, each set has."""


@dataclass(frozen=True)
class Edit:
    """An instruction, and what it makes of a scene."""

    before: Scene
    after: Scene
    instruction: str
    attribute: str
    """What changes: ``colour``, ``ground`` or ``shape``."""


def edge_image(image: Image.Image) -> Image.Image:
    """The edges of a picture, white on black."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    return Image.fromarray((edges(pixels)[0] > 0).numpy().astype(np.uint8) * 255)


def random_edit(rng: np.random.Generator, held_out: bool | None = False) -> Edit:
    """A scene, and an instruction that changes one attribute of it; both scenes are of the base's world."""
    while True:
        before = toy_world.random_scene(rng, held_out=held_out)
        attribute = str(rng.choice(["colour", "ground", "shape"]))
        choices = {"colour": toy_world.COLOURS, "ground": toy_world.GROUNDS, "shape": toy_world.SHAPES}[attribute]
        value = str(rng.choice(choices))
        changed: dict[str, Any] = {attribute: value}
        after = replace(before, **changed)
        shown = after.colour, after.shape, after.ground
        if after != before and after.colour != after.ground and held_out in (None, toy_world.is_held_out(*shown)):
            break
    words = {"colour": f"in {value}", "ground": f"on a {value} background", "shape": toy_world.article(value)}
    return Edit(before, after, words[attribute], attribute)


def draw_edges(folder: Path) -> None:
    """Pictures with their edges, as ``conditioning_image``, and captions."""
    rows = []
    for k in range(EDGES):
        rng = np.random.default_rng([2, k])
        scene = toy_world.random_scene(rng)
        picture = toy_world.render(scene)
        name, other = f"{k:03}.png", f"edges/{k:03}.png"
        _save(folder / name, picture)
        _save(folder / other, edge_image(picture))
        rows.append(
            {
                "file_name": name,
                "conditioning_image_file_name": other,
                "text": toy_world.random_caption(scene, rng),
            }
        )
    _list(folder, rows)


def draw_shapes(folder: Path) -> None:
    """Pictures of every shape, half of them of those that the base has never seen, with captions."""
    rows = []
    for k in range(ALL_SHAPES):
        rng = np.random.default_rng([4, k])
        scene = toy_world.random_scene(rng, toy_world.NEW_SHAPES if k % 2 else toy_world.SHAPES)
        _save(folder / f"{k:04}.png", toy_world.render(scene))
        rows.append({"file_name": f"{k:04}.png", "text": toy_world.random_caption(scene, rng)})
    _list(folder, rows)


def draw_captioned(folder: Path) -> None:
    """Pictures that the base was trained on, with full captions: many, for a CLIP from nothing."""
    rows = []
    for k in range(CAPTIONED):
        scene = toy_world.random_scene(np.random.default_rng([5, k]))
        name = f"{k // 1000:02}/{k % 1000:03}.png"
        _save(folder / name, toy_world.render(scene))
        rows.append({"file_name": name, "text": toy_world.caption(scene)})
    _list(folder, rows)


def draw_edits(folder: Path) -> None:
    """Pictures before and after an edit, as ``input_image`` and ``edited_image``, with instructions."""
    rows = []
    for k, edit in enumerate(_edits()):
        before, after = f"before/{k:03}.png", f"{k:03}.png"
        _save(folder / before, toy_world.render(edit.before))
        _save(folder / after, toy_world.render(edit.after))
        rows.append({"edited_image_file_name": after, "input_image_file_name": before, "edit_prompt": edit.instruction})
    _list(folder, rows)


def _edits() -> Iterator[Edit]:
    for k in range(EDITS):
        yield random_edit(np.random.default_rng([3, k]))


def _save(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def _list(folder: Path, rows: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
