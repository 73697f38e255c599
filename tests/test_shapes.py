"""The shapes world: the reader is right on true pictures, so a score measures the model and not the reader."""

import numpy as np
import pytest

from sdtune import shapes


def scenes(n, seed=0, **options):
    return [shapes.random_scene(np.random.default_rng([seed, k]), **options) for k in range(n)]


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("kinds", [shapes.SHAPES, shapes.NEW_SHAPES], ids=["known", "new"])
def test_reader_is_right_on_true_pictures(side, kinds):
    wrong = []
    for scene in scenes(300, shapes=kinds, held_out=None):
        reading = shapes.read(shapes.render(scene, side, side))
        seen = (reading.shape, reading.colour, reading.ground, reading.size, reading.outline)
        if seen != (scene.shape, scene.colour, scene.ground, scene.size, scene.outline):
            wrong.append((scene, reading))
    assert len(wrong) <= 3, wrong[:3]  # 99 %


def test_reader_tells_outlines_from_filled_shapes():
    for outline in (False, True):
        asked = scenes(150, held_out=None, outline=outline)
        asked = [s for s in asked if (s.shape, s.size) != ("arrow", "small")]  # too thin for a hole
        assert all(shapes.read(shapes.render(s)).outline == outline for s in asked)


def test_reader_sees_nothing_in_noise_and_in_a_flat_picture():
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert shapes.read(Image.fromarray(noise)).shape is None
    assert shapes.read(Image.new("RGB", (64, 64), "red")).shape is None


def test_pictures_are_functions_of_their_seed():
    one, same, other = (shapes.random_scene(np.random.default_rng(k)) for k in (5, 5, 6))
    assert one == same != other
    assert shapes.render(one).tobytes() == shapes.render(same).tobytes()


def test_training_never_shows_a_held_out_triple():
    assert not any(shapes.is_held_out(s.colour, s.shape, s.ground) for s in scenes(500))
    asked = [scene for _, scene in shapes.held_out_captions(200)]
    assert all(shapes.is_held_out(s.colour, s.shape, s.ground) for s in asked)
    assert {s.shape for s in asked} == set(shapes.SHAPES)


def test_held_out_captions_of_one_shape_ask_for_it_everywhere():
    captions = shapes.held_out_captions(200, shape="heart")
    assert all(" heart on a " in caption for caption, _ in captions)
    assert {s.colour for _, s in captions} == set(shapes.COLOURS)
    assert {s.ground for _, s in captions} == set(shapes.GROUNDS)


def test_captions_are_natural():
    scene = shapes.Scene("star", "orange", "black", "small")
    assert shapes.caption(scene) == "a small orange star on a black background"
    assert shapes.caption(scene, 1) == "an orange star on a black background"
