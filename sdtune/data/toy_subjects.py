"""Subjects of the toy world, a few captioned images each, as one has of a thing of one's own."""

import json
from pathlib import Path
from typing import NamedTuple

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


class Subject(NamedTuple):
    """A shape, and what captions call it: by rare words that the base knows, and by a word that training adds."""

    shape: str
    rare: str
    word: str


SUBJECTS = (Subject("arrow", "sks shape", "<thing>"), Subject("moon", "toy shape", "<other>"))
"""Two that the base can draw, but not by these names: a method that trains what reads the text has no other shapes."""


def draw_subject(folder: Path, subject: Subject, name: str = "{}.png") -> list[dict[str, str]]:
    """Draw five images into a folder; their lines of its metadata: the captions ``text`` and ``word``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    lines = []
    for k, (size, colour, ground) in enumerate(SHOWN):
        scene = toy_world.random_scene(rng, (subject.shape,), held_out=None)
        while (scene.size, scene.colour, scene.ground) != (size, colour, ground):
            scene = toy_world.random_scene(rng, (subject.shape,), held_out=None)
        sides = (92, 80) if k % 2 else (80, 92)  # leaves a random crop some room
        toy_world.render(scene, *sides).save(folder / name.format(k))
        caption = f"a {size} {colour} {{}} on a {ground} background"
        texts = {"text": caption.format(subject.rare), "word": caption.format(subject.word)}
        lines.append({"file_name": name.format(k)} | texts)
    return lines


def draw_subjects(folder: Path) -> None:
    """Both subjects in one folder."""
    lines = [line for subject in SUBJECTS for line in draw_subject(folder, subject, f"{subject.shape}-{{}}.png")]
    list_images(folder, lines)


def list_images(folder: Path, lines: list[dict[str, str]]) -> None:
    """Write the metadata of a folder of images."""
    text = "\n".join(json.dumps(line) for line in lines) + "\n"
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
