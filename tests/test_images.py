"""One defined conversion for each kind of image file, and every broken one found out."""

import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from sdtune.data.images import MAX_PIXELS, decode, inspect_image, to_tensor

SIZE = (20, 12)


def encoded(image, format_="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def picture(size=SIZE):
    """Smooth, with four different corners, so that every turn and mirror differs."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray(np.stack([255 * x, 255 * y, 127 * (x + y)], 2).astype(np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(side):
    """A PNG of side x side black 1-bit pixels, made without ever holding them."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF"])
def test_rgb_is_kept_exactly(format_):
    assert (pixels(decode(encoded(picture(), format_))) == pixels(picture())).all()


@pytest.mark.parametrize("options", [{"format_": "JPEG", "quality": 98}, {"format_": "WEBP", "quality": 98}])
def test_lossy_formats_are_read(options):
    assert abs(pixels(decode(encoded(picture(), **options))) - pixels(picture())).mean() < 3


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_all_exif_orientations_are_upright_and_equal(format_):
    turn = Image.Transpose
    stored = {  # what a camera writes: the inverse of what the viewer must do
        1: None,
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    for orientation, method in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = picture() if method is None else picture().transpose(method)
        data = encoded(image, format_, exif=exif, **({} if format_ == "TIFF" else {"quality": 100}))
        assert abs(pixels(decode(data)) - pixels(picture())).mean() < 6, orientation
        assert (inspect_image(data).width, inspect_image(data).height) == SIZE, orientation


def test_orientation_beside_transparency_and_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("LA", SIZE, (0, 0)).transpose(Image.Transpose.ROTATE_90)
    upright = decode(encoded(image, exif=exif))
    assert upright.size == SIZE
    assert (pixels(upright) == 255).all()


def test_broken_exif_leaves_the_pixels():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert inspect_image(data).problem is None
    assert decode(data).size == SIZE


GREY = np.linspace(0, 255, 20 * 12).round().reshape(12, 20)


@pytest.mark.parametrize(
    ("array", "format_"),
    [
        (GREY.astype(np.uint8), "PNG"),
        ((GREY * 257).astype(np.uint16), "PNG"),
        ((GREY * 257).astype(np.uint16), "TIFF"),
        ((GREY * 257).astype(">u2"), "TIFF"),
        ((GREY * 257).astype(np.int32), "TIFF"),
        (GREY.astype(np.int32), "TIFF"),
        ((GREY * 65536).astype(np.int32), "TIFF"),
        ((GREY / 255).astype(np.float32), "TIFF"),
        (GREY.astype(np.float32), "TIFF"),
        ((GREY * 257).astype(np.float32), "TIFF"),
        ((GREY / 127.5 - 1).astype(np.float32), "TIFF"),
    ],
)
def test_grey_of_any_depth_is_scaled(array, format_):
    read = pixels(decode(encoded(Image.fromarray(array), format_)))
    assert (read == GREY[:, :, None]).all()


def test_a_dark_16_bit_image_stays_dark():
    array = np.full((4, 4), 200, np.uint16)
    assert pixels(decode(encoded(Image.fromarray(array)))).max() == 1


def test_one_bit():
    image = Image.fromarray(GREY.astype(np.uint8)).convert("1")
    assert set(np.unique(pixels(decode(encoded(image))))) == {0, 255}


def test_not_a_number_is_black():
    array = np.array([[np.nan, 1.0], [0.5, np.inf]], np.float32)
    assert pixels(decode(encoded(Image.fromarray(array), "TIFF")))[..., 0].tolist() == [[0, 255], [128, 0]]


def test_transparency_is_laid_on_white():
    hidden = Image.new("RGBA", SIZE, (255, 0, 0, 0))
    half = Image.new("RGBA", SIZE, (255, 0, 0, 128))
    grey = Image.new("LA", SIZE, (0, 0))
    assert (pixels(decode(encoded(hidden))) == 255).all()
    assert pixels(decode(encoded(half)))[0, 0].tolist() == [255, 127, 127]
    assert (pixels(decode(encoded(grey))) == 255).all()
    assert (pixels(decode(encoded(hidden, "WEBP", lossless=True, exact=True))) == 255).all()


def test_palette_with_and_without_transparency():
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert pixels(decode(encoded(image)))[0, 0].tolist() == [200, 100, 50]
    assert (pixels(decode(encoded(image, transparency=1))) == 255).all()
    assert (pixels(decode(encoded(image, transparency=b"\xff\x00"))) == 255).all()


def test_a_transparent_colour_of_rgb_and_grey():
    red = Image.new("RGB", SIZE, (255, 0, 0))
    assert (pixels(decode(encoded(red, transparency=(255, 0, 0)))) == 255).all()
    assert (pixels(decode(encoded(Image.new("L", SIZE, 7), transparency=7))) == 255).all()


def test_cmyk_with_and_without_a_profile():
    cmyk = Image.new("CMYK", SIZE, (0, 255, 255, 0))
    plain = pixels(decode(encoded(cmyk, "JPEG")))[0, 0]
    assert plain[0] > 240
    assert plain[1:].max() < 15
    # A profile of another colour space, and one that is none: as without.
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (pixels(decode(encoded(cmyk, "JPEG", icc_profile=rgb)))[0, 0] == plain).all()
    assert (pixels(decode(encoded(cmyk, "JPEG", icc_profile=b"nonsense")))[0, 0] == plain).all()


def test_the_profile_of_a_cmyk_image_is_used(monkeypatch):
    def through(image, profile, target, **options):
        return Image.new(options["outputMode"], image.size, profile.decode())

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda content: content.read())
    monkeypatch.setattr(ImageCms, "profileToProfile", through)
    data = encoded(Image.new("CMYK", SIZE), "JPEG", icc_profile=b"green")
    assert pixels(decode(data))[0, 0].tolist() == [0, 128, 0]


# ---- broken files


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_short_is_found(format_):
    whole = encoded(picture((64, 64)), format_)
    assert inspect_image(whole).problem is None
    assert "truncated or corrupt" in inspect_image(whole[: len(whole) * 2 // 3]).problem


@pytest.mark.fault("A checksum inside an image does not match", "It counts as damaged.")
def test_a_damaged_checksum_is_found():
    data = bytearray(encoded(picture((64, 64))))
    data[data.index(b"IDAT") + 40] ^= 0xFF
    assert "truncated or corrupt" in inspect_image(bytes(data)).problem


@pytest.mark.fault("A web page or another file is named as an image", "Refused as what it is.")
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of the accepted kinds"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of the accepted kinds"),
    ],
)
def test_what_is_no_image_is_called_by_its_name(data, said):
    assert said in inspect_image(data).problem
    with pytest.raises(OSError, match="cannot identify"):
        decode(data)


def test_a_missing_file_is_a_problem_not_an_exception(tmp_path):
    assert "No such file" in inspect_image(tmp_path / "gone.png").problem


@pytest.mark.fault("An image of a few kilobytes unpacks to gigabytes", "Refused from its header, undecoded.")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_bomb_is_refused_from_its_header(side):
    data = bomb(side)
    assert len(data) < 60_000
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = inspect_image(data)
    assert "more than 50 million pixels" in found.problem
    assert time.process_time() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB


def test_a_large_image_below_the_limit_passes():
    assert inspect_image(encoded(Image.new("1", (1000, 1000)))).problem is None
    assert inspect_image(encoded(Image.new("1", (1000, 1000))), max_pixels=999_999).problem
    assert MAX_PIXELS == 50_000_000


def test_probe_of_a_path_and_of_its_bytes_agree(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))  # a PNG by content
    assert inspect_image(tmp_path / "a.jpg") == inspect_image(encoded(picture()))
    assert len(inspect_image(tmp_path / "a.jpg").sha256) == 64


# ---- geometry


def test_an_image_of_the_shape_is_untouched():
    tensor = to_tensor(picture(), *SIZE, 0.3, 0.9, False, "lanczos")
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 12, 20)
    assert torch.equal(((tensor + 1) * 127.5).round(), torch.tensor(pixels(picture())).permute(2, 0, 1).float())


def test_range():
    assert to_tensor(Image.new("RGB", SIZE, "white"), 8, 8, 0.5, 0.5, False, "bicubic").unique().tolist() == [1.0]
    assert to_tensor(Image.new("RGB", SIZE), 8, 8, 0.5, 0.5, False, "bicubic").unique().tolist() == [-1.0]


@pytest.mark.parametrize("mode", ["lanczos", "bicubic", "bilinear", "box", "nearest"])
@pytest.mark.parametrize("size", [(53, 31), (31, 53), (9, 200), (8, 8)])
def test_the_same_as_resize_then_crop(mode, size):
    rng = np.random.default_rng(0)
    # Mid-greys: Pillow may swap its two passes, and the first rounds and clips to 8 bits.
    image = Image.fromarray(rng.integers(96, 160, (size[1], size[0], 3), dtype=np.uint8))
    left, top = 0.25, 0.8
    scale = max(16 / size[0], 24 / size[1])
    covering = max(16, round(size[0] * scale)), max(24, round(size[1] * scale))
    x, y = round(left * (covering[0] - 16)), round(top * (covering[1] - 24))
    slow = image.resize(covering, Image.Resampling[mode.upper()]).crop((x, y, x + 16, y + 24))
    fast = ((to_tensor(image, 16, 24, left, top, False, mode) + 1) * 127.5).permute(1, 2, 0).numpy()
    differing = abs(fast - pixels(slow))
    assert differing.max() < 2.5 or (mode == "nearest" and (differing > 0.5).mean() < 0.2)


def test_offsets_reach_both_edges_and_the_flip_comes_last():
    image = picture((40, 12))
    wide = to_tensor(image, 40, 12, 0, 0, False, "lanczos")
    assert torch.equal(to_tensor(image, 12, 12, 0, 0.5, False, "lanczos"), wide[:, :, :12])
    assert torch.equal(to_tensor(image, 12, 12, 1, 0.5, False, "lanczos"), wide[:, :, -12:])
    assert torch.equal(to_tensor(image, 12, 12, 0, 0.5, True, "lanczos"), wide[:, :, :12].flip(2))


def test_a_sliver_is_not_blown_up_before_the_crop():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert to_tensor(Image.new("RGB", (5000, 3)), 512, 512, 0.5, 0.5, False, "lanczos").shape == (3, 512, 512)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB; the whole is 1.3 GB
