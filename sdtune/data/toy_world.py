"""The images that the embedded base model was trained on: one flat shape on a flat ground, with a caption.

An image is a pure function of a ``Scene``, and a scene of a generator. ``read`` recovers shape, colours and size from
any image without a model, so it can measure a generator. The base was not trained on ``star``, ``heart`` and shapes in
``outline``, so that adapters can learn them, nor on a fifth of the (colour, shape, ground) triples, with which one
measures whether captions are followed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RGB = {
    "red": (220, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (245, 220, 60),
    "green": (40, 160, 60),
    "blue": (45, 85, 215),
    "purple": (130, 45, 160),
    "pink": (250, 165, 200),
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
    "black": (20, 20, 20),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
GROUNDS = ("white", "black", "gray", "blue", "green", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "moon", "arrow")
NEW_SHAPES = ("star", "heart")
RADIUS = {"small": 0.21, "big": 0.36}  # of the shorter side
TINT = 6.0  # standard deviation of the colours, of 255
SUPERSAMPLING = 4
OUTLINE_WIDTH = 0.26  # of the radius

WORDS = (
    *dict.fromkeys((*COLOURS, *GROUNDS, *SHAPES, *NEW_SHAPES, *RADIUS)),
    *"a an the on of in with and background photo picture painting drawing outline style".split(),
    *"sks toy dog cat person shape object".split(),
)


@dataclass(frozen=True)
class Scene:
    """What an image shows. Lengths are shares of the shorter side, the centre is relative to the image's."""

    shape: str
    colour: str
    ground: str
    size: str = "big"
    outline: bool = False
    centre: tuple[float, float] = (0.0, 0.0)
    radius: float = RADIUS["big"]
    tint: tuple[tuple[float, ...], ...] = ((0.0,) * 3, (0.0,) * 3)  # added to the colours of shape and ground


@dataclass(frozen=True)
class Reading:
    """What ``read`` sees; ``shape`` is ``None`` if no silhouette is close; ``match`` is its overlap (0 to 1)."""

    shape: str | None
    colour: str
    ground: str
    size: str
    outline: bool
    match: float


def is_held_out(colour: str, shape: str, ground: str) -> bool:
    """Whether the base was not trained on this triple: one in five; it was trained on every pair."""
    everything = SHAPES + NEW_SHAPES
    return (COLOURS.index(colour) + 2 * everything.index(shape) + 3 * GROUNDS.index(ground)) % 5 == 0


def random_scene(
    rng: np.random.Generator,
    shapes: Sequence[str] = SHAPES,
    held_out: bool | None = False,
    outline: bool = False,
) -> Scene:
    """A scene of the base's world; ``held_out`` picks the triples never trained on, ``None`` any of them."""
    while True:
        shape, colour, ground = (str(rng.choice(words)) for words in (shapes, COLOURS, GROUNDS))
        if colour != ground and held_out in (None, is_held_out(colour, shape, ground)):
            break
    size = str(rng.choice(list(RADIUS)))
    radius = RADIUS[size] * rng.uniform(0.9, 1.1)
    room = 0.47 - radius
    x, y = np.clip(rng.normal(0, 0.07, 2), -room, room)
    tint = tuple(tuple(float(c) for c in row) for row in rng.normal(0, TINT, (2, 3)))
    return Scene(shape, colour, ground, size, outline, (float(x), float(y)), float(radius), tint)


def caption(scene: Scene, form: int = 0) -> str:
    """The scene in words; form 0 is the full sentence, the others leave words out or put words before it."""
    thing = f"{scene.colour} {scene.shape}"
    sized = f"{scene.size} {thing}"
    where = f" on a {scene.ground} background"
    style = " in outline style" if scene.outline else ""
    return (
        f"{article(sized)}{where}",
        f"{article(thing)}{where}",
        f"a photo of {article(sized)}{where}",
        f"a painting of {article(thing)}{where}",
        f"{thing}{where}",
        f"{article(sized)}",
        f"{thing}",
    )[form] + style


CAPTION_ODDS = (0.4, 0.25, 0.1, 0.05, 0.1, 0.05, 0.05)  # of the forms of ``caption``, in training


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    return caption(scene, int(rng.choice(len(CAPTION_ODDS), p=CAPTION_ODDS)))


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def held_out_captions(n: int, seed: int = 0, shape: str | None = None) -> list[tuple[str, Scene]]:
    """``n`` full captions that the base never saw, with their scenes; all of one ``shape`` if it is given."""
    rng = np.random.default_rng([seed, 7])
    shapes, held_out = (SHAPES, True) if shape is None else ((shape,), None)
    scenes = [random_scene(rng, shapes, held_out) for _ in range(n)]
    return [(caption(scene), scene) for scene in scenes]


def polygon(shape: str) -> np.ndarray:
    """The corners of a shape of radius 1 around the origin, y pointing down: ``[N, 2]``."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    match shape:
        case "circle":
            return np.stack([np.cos(turn), np.sin(turn)], 1)
        case "square":
            return 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        case "triangle":
            return np.array([(0, -0.95), (1, 0.85), (-1, 0.85)])
        case "diamond":
            return np.array([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)])
        case "cross":
            a = 0.34
            right = [(a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1)]
            return np.array(right + [(-x, -y) for x, y in right])
        case "moon":
            outer = np.linspace(0.22 * np.pi, 1.78 * np.pi, 64)
            start, back = np.array([np.cos(outer[0]), np.sin(outer[0])]), 0.86
            shift = start[0] + np.sqrt(back**2 - start[1] ** 2) * 0.55
            inner_r = np.hypot(start[0] - shift, start[1])
            edge = np.arctan2(start[1], start[0] - shift)
            inner = np.linspace(2 * np.pi - edge, edge, 64)
            bow = np.stack([shift + inner_r * np.cos(inner), inner_r * np.sin(inner)], 1)
            return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), bow])
        case "arrow":
            top = [(-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1, 0)]
            return np.array(top + [(x, -y) for x, y in reversed(top[:-1])])
        case "star":
            spoke = np.where(np.arange(10) % 2, 0.42, 1.05)
            angle = np.arange(10) * np.pi / 5 - np.pi / 2
            return np.stack([spoke * np.cos(angle), spoke * np.sin(angle)], 1)
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            return np.stack([x, -y - 2.5], 1) / 15.5
    raise ValueError(f"no shape called {shape!r}")


def render(scene: Scene, width: int = 64, height: int = 64) -> Image.Image:
    """The image of a scene, RGB; the shape lies within the centre square."""
    size = np.array([width, height]) * SUPERSAMPLING
    side = size.min()
    colour, ground = (
        tuple(int(c) for c in np.clip(np.add(RGB[name], tint), 0, 255))
        for name, tint in zip((scene.colour, scene.ground), scene.tint, strict=True)
    )
    big = Image.new("RGB", (int(size[0]), int(size[1])), ground)
    corners = (polygon(scene.shape) * scene.radius + scene.centre) * side + size / 2 - 0.5
    points = [(float(x), float(y)) for x, y in corners]
    draw = ImageDraw.Draw(big)
    if scene.outline:
        draw.polygon(points, outline=colour, width=round(OUTLINE_WIDTH * scene.radius * side))
    else:
        draw.polygon(points, fill=colour)
    return big.resize((width, height), Image.Resampling.BOX)


def nearest_colour(rgb: np.ndarray, names: Sequence[str]) -> str:
    return min(names, key=lambda name: float(np.square(rgb - np.array(RGB[name])).sum()))


def normalised(mask: np.ndarray, side: int = 32) -> np.ndarray:
    """A silhouette ``[H, W]`` scaled to fill a square at the same aspect ratio: bool ``[side, side]``."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    span = max(cut.shape)
    top, left = (span - cut.shape[0]) // 2, (span - cut.shape[1]) // 2
    square = np.zeros((span, span), np.uint8)
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut * np.uint8(255)
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR)) > 127


@cache
def templates() -> dict[str, np.ndarray]:
    """The normalised silhouette of every shape."""
    scenes = {shape: Scene(shape, "black", "white") for shape in SHAPES + NEW_SHAPES}
    return {s: normalised(np.asarray(render(scene, 128, 128))[..., 0] < 128) for s, scene in scenes.items()}


def filled(mask: np.ndarray) -> np.ndarray:
    """A silhouette without its holes."""
    outside = Image.fromarray(np.pad(mask, 1).astype(np.uint8) * 255).copy()
    ImageDraw.floodfill(outside, (0, 0), 128)
    return (np.asarray(outside) != 128)[1:-1, 1:-1]


def _figure(image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Pixels, the colour of the ground (the border's median), and what differs from it; ``None`` for flat or noise."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(border, 0)
    distance = np.sqrt(np.square(pixels - ground).sum(-1))
    contrast = np.quantile(distance, 0.985)
    speckled = Image.fromarray((distance > contrast / 2).astype(np.uint8) * 255)
    mask = np.asarray(speckled.filter(ImageFilter.MedianFilter(3))) > 127
    nothing = contrast < 40 or mask.sum() < 9 or mask.mean() > 0.6
    return pixels, ground, None if nothing else mask


def overlap(image: Image.Image, scene: Scene) -> float:
    """Intersection over union, in place, of the shape that an image shows and that of a scene; 0 if it shows none."""
    shown, wanted = _figure(image)[2], _figure(render(replace(scene, outline=False), *image.size))[2]
    if shown is None or wanted is None:
        return 0.0
    shown, wanted = filled(shown), filled(wanted)
    return float((shown & wanted).sum() / (shown | wanted).sum())


def read(image: Image.Image, least_match: float = 0.7) -> Reading:
    """What an image shows: the ground is the border's median colour, the rest is what differs from it.

    The silhouette with the largest intersection over union names the shape, if that reaches ``least_match``.
    """
    pixels, ground_rgb, mask = _figure(image)
    ground = nearest_colour(ground_rgb, GROUNDS)
    if mask is None:
        return Reading(None, ground, ground, "small", False, 0.0)
    core = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(3))) > 127
    colour = nearest_colour(np.median(pixels[core if core.sum() >= 9 else mask], 0), COLOURS)
    solid = filled(mask)
    outline = bool(mask.sum() < 0.82 * solid.sum())
    silhouette = normalised(solid)
    matches = {s: float((silhouette & t).sum() / (silhouette | t).sum()) for s, t in templates().items()}
    best = max(matches, key=matches.__getitem__)
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    span = max(np.ptp(rows), np.ptp(columns)) + 1
    size = "small" if span < 0.56 * min(mask.shape) else "big"
    shape = best if matches[best] >= least_match else None
    return Reading(shape, colour, ground, size, outline, matches[best])
