"""Kinds of image files: all that people have are read, and what only a part of is read is named."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from sdtune.data import load_images
from sdtune.data.images import decode, inspect_image
from tests.image_folders import config, names, paint, refusal, summary


@pytest.mark.parametrize("name", ["a.avif", "a.jfif", "a.gif", "a.JPG", "a.apng", "a.heic", "a.HEIF"])
def test_further_kinds_are_read(tmp_path, name):
    if name.lower().endswith(("heic", "heif")):
        pytest.importorskip("pillow_heif")
    kind = {"apng": "PNG", "jfif": "JPEG", "heic": "HEIF"}.get(name.rpartition(".")[2])
    image = Image.new("RGB", (16, 16), (200, 90, 30))
    image.save(tmp_path / name, kind)
    assert names(load_images(config(tmp_path, caption="x"))) == [name]
    assert np.abs(np.asarray(decode(tmp_path / name)).astype(int) - np.asarray(image)).max() < 40


def test_heic_without_its_extra(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    monkeypatch.setattr("sdtune.data.images.FORMATS", ("PNG", "JPEG"))
    assert "a.heic: a HEIC image; pip install 'sdtune[heic]'" in refusal(tmp_path, caption="x")


def animated(kind, frames=3):
    data = BytesIO()
    first, *rest = (Image.new("RGB", (16, 16), (80 * k, 90, 30)) for k in range(frames))
    first.save(data, kind, save_all=True, append_images=rest)
    return data.getvalue()


@pytest.mark.fault("An image has several frames or pages", "It is named; `--first-frame` takes the first.")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.gif", "GIF"), ("a.webp", "WEBP"), ("a.png", "PNG"), ("a.tif", "TIFF"), ("a.avif", "AVIF"), ("b.png", "GIF")],
)
def test_animations_and_pages_are_named(tmp_path, name, kind):
    (tmp_path / name).write_bytes(animated(kind))
    paint(tmp_path / "still.png")
    said = refusal(tmp_path, caption="x")
    assert f"{name}: has 3 frames; take the first with --first-frame" in said and "still" not in said
    assert names(load_images(config(tmp_path, caption="x", on_bad_image="skip"))) == ["still.png"]
    assert names(load_images(config(tmp_path, caption="x", first_frame=True))) == [name, "still.png"]
    assert f"of which the first is used: 1 ({name})" in summary(tmp_path, caption="x", first_frame=True)
    assert np.asarray(decode(tmp_path / name)).mean(axis=(0, 1))[0] < 10
    with pytest.raises(ValueError, match="3 frames"):
        decode(tmp_path / name, first_frame=False)


def test_the_further_pictures_of_a_photograph_are_no_frames():
    data = BytesIO()
    one, two = (Image.new("RGB", (16, 16), (80 * k, 90, 30)) for k in range(2))
    one.save(data, "MPO", save_all=True, append_images=[two])
    found = inspect_image(data.getvalue())
    assert found.problem is None and found.frames == 1


def taller(content, kind):
    """The same data under a header of twice the rows."""
    data = bytearray(content)
    if kind == "PNG":
        data[20:24] = struct.pack(">I", 2 * struct.unpack(">I", data[20:24])[0])
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)
    at = next(data.index(mark) for mark in (b"\xff\xc0\x00", b"\xff\xc2\x00") if mark in data)
    data[at + 5 : at + 7] = struct.pack(">H", 2 * struct.unpack(">H", data[at + 5 : at + 7])[0])
    return bytes(data)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 61, 3), dtype=np.uint8))


@pytest.mark.fault("A header promises more rows than there are", "It counts as truncated.")
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
def test_a_png_with_fewer_rows_than_its_header_says(mode):
    data = BytesIO()
    NOISE.convert(mode).save(data, "PNG")
    assert inspect_image(data.getvalue()).problem is None
    assert "its last pixels are missing" in inspect_image(taller(data.getvalue(), "PNG")).problem


def test_an_interlaced_png_is_complete():
    """Adam7, written by hand: one grey pixel a pass, and all of them."""
    width = height = 8
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [b"\0" + bytes(row) for x, y, dx, dy in passes for row in pixels[y::dy, x::dx]]

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(rows):
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"".join(rows)))
            + chunk(b"IEND", b"")
        )

    assert inspect_image(png(rows)).problem is None
    assert np.array_equal(np.asarray(decode(png(rows), "L")), pixels)
    assert inspect_image(png(rows[:-1])).problem is not None


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_with_fewer_rows_than_its_header_says(mode, progressive):
    data = BytesIO()
    NOISE.convert(mode).save(data, "JPEG", progressive=progressive)
    assert inspect_image(data.getvalue()).problem is None
    assert "its last pixels are missing" in inspect_image(taller(data.getvalue(), "JPEG")).problem


@pytest.mark.fault("The end of a JPEG is missing, though its end mark is there", "It counts as truncated.")
@pytest.mark.parametrize("restart", [{}, {"restart_marker_blocks": 2}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_that_was_cut_and_closed_again(restart, progressive, subsampling):
    for mode in ("RGB", "L"):
        data = BytesIO()
        NOISE.convert(mode).save(data, "JPEG", quality=90, progressive=progressive, subsampling=subsampling, **restart)
        whole = data.getvalue()
        assert inspect_image(whole).problem is None
        for share in (0.3, 0.7, 0.9):
            assert inspect_image(whole[: int(share * len(whole))] + b"\xff\xd9").problem, share


def test_a_jpeg_with_a_plain_border_is_complete():
    image = Image.new("RGB", (64, 64), "white")
    image.paste(NOISE.crop((0, 0, 40, 20)), (5, 5))
    for progressive in (False, True):
        data = BytesIO()
        image.save(data, "JPEG", progressive=progressive)
        assert inspect_image(data.getvalue()).problem is None


def test_twelve_bits_in_sixteen_are_told(tmp_path):
    for name, top in (("dim", 4095), ("bright", 65535)):
        Image.fromarray(np.linspace(0, top, 256).astype(np.uint16).reshape(16, 16)).save(tmp_path / f"{name}.png")
    assert "without a value above 4095, which therefore stay dark: 1 (dim.png)" in summary(tmp_path, caption="x")


def test_remembered_facts_are_those_of_the_first_look(tmp_path):
    (tmp_path / "a.gif").write_bytes(animated("GIF"))
    said = [refusal(tmp_path, caption="x") for _ in range(2)]
    fields = {"caption": "x", "first_frame": True}
    assert load_images(config(tmp_path, **fields)).rows == load_images(config(tmp_path, **fields)).rows
    assert said == [refusal(tmp_path, caption="x")] * 2
