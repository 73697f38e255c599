"""Further images of a sample: with the same crop and flip in every kind of dataset, and every mismatch named."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdtune.config.methods.controlnet import ControlNetConfig
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.data import load_images, open_images, open_stream, toy_pairs, toy_world
from sdtune.data.conditions import make_condition
from sdtune.data.further import Further, FurtherImage, further_pixels, image_prompts
from tests.image_folders import names, paint, rows_to, write
from tests.tars import pack

COLUMN = "conditioning_image"
PAIRED = {COLUMN: "--conditioning-image-column"}
FURTHER = Further({"condition": FurtherImage(COLUMN, PAIRED[COLUMN])})
COUNT = 6


def config(dataset, **fields):
    return ControlNetConfig(dataset=str(dataset), **{"resolution": 16, "num_validation_images": 2} | fields)


def picture(k: int) -> tuple[bytes, bytes]:
    """A picture, and one of the same pixels whose file differs."""
    image = Image.fromarray(np.random.default_rng(k).integers(0, 256, (24, 20 + k, 3), dtype=np.uint8))
    files = []
    for text in ("", "paired"):
        info, file = PngInfo(), io.BytesIO()
        info.add_text("is", text)
        image.save(file, "PNG", pnginfo=info)
        files.append(file.getvalue())
    return files[0], files[1]


def cells():
    return [(f"{k:02}", *picture(k), f"a cat {k}") for k in range(COUNT)]


def with_table(folder):
    rows = []
    for stem, one, other, text in cells():
        write(folder / "edges" / "x", "")
        (folder / f"{stem}.png").write_bytes(one)
        (folder / "edges" / f"{stem}-e.png").write_bytes(other)
        rows.append({"file_name": f"{stem}.png", f"{COLUMN}_file_name": f"edges/{stem}-e.png", "caption": text})
    rows_to(folder / "metadata.jsonl", *rows)


def with_folders(folder):
    for stem, one, other, text in cells():
        write(folder / "in" / f"{stem}.txt", text)
        (folder / "in" / f"{stem}.png").write_bytes(one)
        write(folder / "in" / COLUMN / "x", "")
        (folder / "in" / COLUMN / f"{stem}.png").write_bytes(other)


def with_column(folder):
    """No column file_name, as ``datasets`` reads it too."""
    with_table(folder)
    table = folder / "metadata.jsonl"
    table.write_text(table.read_text().replace('"file_name"', '"image_file_name"'))


def as_parquet(folder):
    rows = [{"image": {"bytes": a, "path": None}, COLUMN: {"bytes": b, "path": None}, "t": t} for _, a, b, t in cells()]
    (folder / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / "train-0-of-1.parquet")


def as_tar(folder):
    pack(folder / "0.tar", *((k, {"png": a, f"{COLUMN}.png": b, "txt": t.encode()}) for k, a, b, t in cells()))


def saved(folder):
    datasets = pytest.importorskip("datasets")
    kind = datasets.Features({"image": datasets.Image(), COLUMN: datasets.Image(), "t": datasets.Value("string")})
    columns = {
        "image": [a for _, a, _, _ in cells()],
        COLUMN: [b for _, _, b, _ in cells()],
        "t": [c[3] for c in cells()],
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, kind)}).save_to_disk(folder)


STREAMED = {"streaming": True}


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (with_table, {}),
        (with_folders, {}),
        (with_column, {}),
        (saved, {}),
        (as_parquet, {}),
        (as_parquet, STREAMED),
        (as_tar, {}),
    ],
)
def test_a_paired_image_has_the_crop_and_flip_of_its_picture(build, fields, tmp_path):
    build(tmp_path)
    cfg = config(
        tmp_path, center_crop=False, random_flip=True, cache_dir=tmp_path.with_name(f"{tmp_path.name}-cache"), **fields
    )
    stream = open_stream(cfg, open_images(cfg, paired=PAIRED), 2, paired=PAIRED)
    assert stream.epoch_length == COUNT
    assert {stream[p].caption for p in range(COUNT)} == {f"a cat {k}" for k in range(COUNT)}
    shown = [stream[p] for p in range(2 * COUNT)]
    assert {sample.flip for sample in shown} == {True, False} and len({sample.left for sample in shown}) == len(shown)
    for sample in shown:
        assert torch.equal(stream.pixels(sample, COLUMN), stream.pixels(sample))
    masked = cfg.model_copy(update={"masked_loss": True, "mask_column": COLUMN, "image_interpolation_mode": "box"})
    stream = open_stream(masked, open_images(masked), 2)
    for sample in shown:  # each picture is its own mask, in grey
        grey = (stream.pixels(sample) + 1).mul(torch.tensor([299, 587, 114])[:, None, None] / 2000).sum(0, True)
        assert torch.allclose(stream.mask(sample), grey, atol=2 / 255)
    stream = open_stream(cfg, open_images(cfg, paired=PAIRED), 2, paired=PAIRED)
    prompts = image_prompts(stream, FURTHER, stream.examples(2), ["one", "two", "three"], [])
    assert [str(p) for p in prompts] == ["one", "two", "three"]
    assert all(image.size == (16, 16) for p in prompts for image in p.images)


def test_paired_images_are_known_by_their_bytes(tmp_path):
    with_table(tmp_path)

    def prints():
        images = open_images(config(tmp_path), paired=PAIRED)
        stream = open_stream(config(tmp_path), images, 1, paired=PAIRED)
        return images.fingerprint, stream.pixel_key(stream.holdout[0] if stream.holdout else stream[0], COLUMN)

    before = prints()
    assert before[1] != open_stream(config(tmp_path), open_images(config(tmp_path), paired=PAIRED), 1).pixel_key(
        open_stream(config(tmp_path), open_images(config(tmp_path)), 1)[0]
    )
    for k in range(COUNT):
        (tmp_path / "edges" / f"{k:02}-e.png").write_bytes(picture(k)[0])
    after = prints()
    assert before[0] != after[0] and before[1] != after[1]


@pytest.mark.parametrize("build", [with_table, with_folders])
def test_other_methods_leave_paired_images_out(build, tmp_path):
    build(tmp_path)
    images = load_images(LoraConfig(dataset=str(tmp_path), resolution=16))
    assert len(names(images)) == COUNT and all(row.captions[0].startswith("a cat") for row in images.rows)
    assert f"images that belong to others, not trained on: {COUNT}" in " ".join(images.notes)


def lacks_column(folder):
    rows_to(folder / "metadata.jsonl", *({"file_name": f"{k:02}.png", "text": "x"} for k in range(COUNT)))


def lacks_file(folder):
    (folder / "edges" / "03-e.png").unlink()


def lacks_row(folder):
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(lines[1:]))


def other_shape(folder):
    paint(folder / "edges" / "03-e.png", (24, 40))


def broken(folder):
    (folder / "edges" / "03-e.png").write_bytes(b"")


def outside(folder):
    text = (folder / "metadata.jsonl").read_text().replace("edges/03-e.png", "../03-e.png")
    (folder / "metadata.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lacks_column, "--conditioning-image-column conditioning_image: "),
        (lacks_file, "metadata.jsonl:4: conditioning_image_file_name: there is no image edges/03-e.png"),
        (lacks_row, "00.png: no row in metadata.jsonl"),
        (other_shape, "03.png: its conditioning_image has another shape: 24 x 40, and the image 23 x 24"),
        (broken, "03.png: its conditioning_image: an empty file"),
        (outside, "metadata.jsonl:4: conditioning_image_file_name: ../03-e.png is outside of the dataset folder"),
    ],
)
def test_what_is_wrong_with_paired_images_is_named(spoil, told, tmp_path):
    with_table(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        open_images(config(tmp_path, caption="x" if spoil is not lacks_row else None), paired=PAIRED)
    assert told in str(caught.value)


def test_missing_paired_images_of_other_kinds_are_named(tmp_path):
    with_folders(tmp_path)
    (tmp_path / "in" / COLUMN / "03.png").unlink()
    with pytest.raises(UserError, match=f"in/03.png: no in/{COLUMN}/03.png"):
        open_images(config(tmp_path), paired=PAIRED)
    with pytest.raises(UserError, match=r"\(--edges\).*02|--edges edges"):
        open_images(config(tmp_path), paired={"edges": "--edges"})
    pack(tmp_path / "0.tar", ("a", {"png": picture(0)[0], "txt": b"x"}))
    with pytest.raises(UserError, match=r"conditioning_image \(such as .conditioning_image.png\)"):
        open_images(config(tmp_path / "0.tar"), paired=PAIRED)
    pack(tmp_path / "0.tar", ("a", {"png": picture(0)[0], "txt": b"x", f"{COLUMN}.png": picture(1)[0]}))
    cfg = config(tmp_path / "0.tar")
    with pytest.raises(UserError, match="its conditioning_image has another shape"):
        open_stream(cfg, open_images(cfg, paired=PAIRED), 1, paired=PAIRED)[0]


@pytest.mark.parametrize("kind", ["edges", "blur", "grey", "mask"])
def test_conditions_made_from_the_picture(kind, tmp_path):
    """With its crop and flip, the same at a position each time; and none is the picture itself."""
    with_table(tmp_path)
    cfg = config(tmp_path, random_flip=True, condition=kind)
    stream = open_stream(cfg, open_images(cfg), 1)
    image = FurtherImage(condition=kind)
    for position in range(3):
        sample = stream[position]
        made = further_pixels(stream, image, sample, position)
        assert made.shape == (3, 16, 16) and made.min() >= -1 and made.max() <= 1
        assert torch.equal(made, further_pixels(stream, image, sample, position))
        assert not torch.equal(made, stream.pixels(sample))


def test_edges_are_where_the_colours_change():
    pixels = torch.full((3, 8, 8), -1.0)
    pixels[0, :, 4:] = 1  # red from the fifth column on
    expected = torch.full((8, 8), -1.0)
    expected[:, 3:5] = 1
    assert torch.equal(make_condition("edges", pixels, torch.Generator()), expected.expand(3, 8, 8))


@pytest.mark.parametrize(("name", "column", "count"), [("tiny-edges", COLUMN, 800), ("tiny-edits", "input_image", 700)])
def test_built_in_pairs(name, column, count):
    image = "image" if name == "tiny-edges" else "edited_image"
    images = open_images(config(name, image_column=image), paired={column: "--x"})
    assert len(images.rows) == count
    readings = [toy_world.read(Image.open(images.read(k))) for k in range(20)]
    assert {r.shape for r in readings} <= {*toy_world.SHAPES} and all(r.match > 0.7 for r in readings)
    assert len(images.paired[column].rows) == count
    for row in images.rows[:20]:
        words = row.captions[0].split()
        assert set(words) <= set(toy_world.WORDS)


def test_an_edit_changes_one_thing():
    for k in range(50):
        edit = toy_pairs.random_edit(np.random.default_rng(k))
        changed = [
            n
            for n in ("shape", "colour", "ground", "size", "centre", "radius")
            if getattr(edit.before, n) != getattr(edit.after, n)
        ]
        assert changed == [edit.attribute]
        assert getattr(edit.after, edit.attribute) in edit.instruction


def test_a_row_says_which_image_it_edits(tmp_path):
    """Columns as InstructPix2Pix's dataset has them: no ``file_name``, and the instruction is the only other column."""
    for name in ("a", "b"):
        paint(tmp_path / f"{name}.png")
    row = {"input_image_file_name": "a.png", "edited_image_file_name": "b.png", "edit_prompt": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    images = load_images(config(tmp_path, image_column="edited_image"), paired={"input_image": "--x"})
    assert names(images) == ["b.png"] and names(images.paired["input_image"]) == ["a.png"]
    assert images.rows[0].captions == ("x",)
