"""Bucket shapes: what photographs lose when they are cropped to one, and what is said of it."""

import pytest

from sdtune.config.methods.lora import LoraConfig
from sdtune.data.buckets import bucket_shapes, nearest_shape
from tests.image_folders import paint, summary

DEFAULTS = LoraConfig(dataset="x")


@pytest.mark.parametrize("resolution", [512, 768, 1024])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 4), (4, 3), (3, 2), (16, 10), (16, 9), (2, 3), (9, 16)])
def test_common_aspects_lose_at_most_three_per_cent(resolution, width, height):
    shapes = bucket_shapes(resolution, DEFAULTS.bucket_step, DEFAULTS.bucket_max_aspect)
    across, down = nearest_shape(shapes, width * 1000, height * 1000)
    ratio = across / down * height / width
    assert 1 - min(ratio, 1 / ratio) < 0.03
    assert 0.85 * resolution**2 <= across * down <= resolution**2


def test_what_is_cut_is_told(tmp_path):
    paint(tmp_path / "wide.png", (1600, 200))
    paint(tmp_path / "square.png", (64, 64))
    fields = {"caption": "x", "resolution": 64}
    assert "lose more than 3 % when cropped: 1 (most wide.png, 88%); --buckets keeps more" in summary(
        tmp_path, **fields
    )
    said = summary(tmp_path, **fields, buckets=True)
    assert "lose more than 3 % when cropped: 1 (most wide.png, 7" in said and "--bucket-max-aspect" in said
    assert "(most wide.png, 12%)" in summary(tmp_path, **fields, buckets=True, bucket_max_aspect=8.0)
