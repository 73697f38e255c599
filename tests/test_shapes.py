"""The shapes world: the reader is right on true pictures, so a score measures the model and not the reader."""

import numpy as np
import pytest

from sdtune.data import toy_world


def scenes(n, seed=0, **options):
    return [toy_world.random_scene(np.random.default_rng([seed, k]), **options) for k in range(n)]


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("kinds", [toy_world.SHAPES, toy_world.NEW_SHAPES], ids=["known", "new"])
def test_reader_is_right_on_true_pictures(side, kinds):
    wrong = []
    for scene in scenes(100, shapes=kinds, held_out=None):
        reading = toy_world.read(toy_world.render(scene, side, side))
        seen = (reading.shape, reading.colour, reading.ground, reading.size, reading.outline)
        if seen != (scene.shape, scene.colour, scene.ground, scene.size, scene.outline):
            wrong.append((scene, reading))
    assert len(wrong) <= 1, wrong  # 99 %


def test_reader_tells_outlines_from_filled_shapes():
    for outline in (False, True):
        asked = scenes(150, held_out=None, outline=outline)
        asked = [s for s in asked if (s.shape, s.size) != ("arrow", "small")]  # too thin for a hole
        assert all(toy_world.read(toy_world.render(s)).outline == outline for s in asked)


def test_reader_sees_nothing_in_noise_and_in_a_flat_picture():
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert toy_world.read(Image.fromarray(noise)).shape is None
    assert toy_world.read(Image.new("RGB", (64, 64), "red")).shape is None


def test_pictures_are_functions_of_their_seed():
    one, same, other = (toy_world.random_scene(np.random.default_rng(k)) for k in (5, 5, 6))
    assert one == same != other
    assert toy_world.render(one).tobytes() == toy_world.render(same).tobytes()


def test_training_never_shows_a_held_out_triple():
    assert not any(toy_world.is_held_out(s.colour, s.shape, s.ground) for s in scenes(500))
    asked = [scene for _, scene in toy_world.held_out_captions(200)]
    assert all(toy_world.is_held_out(s.colour, s.shape, s.ground) for s in asked)
    assert {s.shape for s in asked} == set(toy_world.SHAPES)


def test_held_out_captions_of_one_shape_ask_for_it_everywhere():
    captions = toy_world.held_out_captions(200, shape="heart")
    assert all(" heart on a " in caption for caption, _ in captions)
    assert {s.colour for _, s in captions} == set(toy_world.COLOURS)
    assert {s.ground for _, s in captions} == set(toy_world.GROUNDS)


def test_captions_are_natural():
    scene = toy_world.Scene("star", "orange", "black", "small")
    assert toy_world.caption(scene) == "a small orange star on a black background"
    assert toy_world.caption(scene, 1) == "an orange star on a black background"
