"""Datasets of every kind, bad ones named in full, and samples that depend on seed and position alone."""

import hashlib
import importlib
import json
import os
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.data import Stream, builtin, cache_root, image_info, load_images, positions, summarize
from sdtune.data.buckets import bucket_shapes, nearest_shape
from sdtune.run.barrier import parted
from tests.image_folders import count_words


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """Where the images of a test go; beside it is outside."""
    path = tmp_path / "pictures"
    path.mkdir()
    return path


def config(dataset, **fields):
    step = {"bucket_step": 8} if fields.get("buckets") else {}
    return LoraConfig(dataset=str(dataset), **{"resolution": 16} | step | fields)


def paint(path, size=(24, 16), shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 90, 200)).save(path)
    return path


def filled(folder, count=7, sizes=((24, 16),)):
    """``count`` different images with a caption file each."""
    for i in range(count):
        paint(folder / f"{i:03}.png", sizes[i % len(sizes)], shade=i)
        (folder / f"{i:03}.txt").write_text(f"picture {i}, red, blue, green\n")
    return folder


def rows_to(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def refusal(dataset, **fields):
    with pytest.raises(UserError) as caught:
        load_images(config(dataset, **fields))
    return str(caught.value)


def captions_of(images):
    return {row.name: row.captions for row in images.rows}


# ---- sources


def test_metadata_in_each_format_gives_the_same_rows(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["ä.png", "sub/b.JPG"]
    texts = ['Ein Bär, "süß"', "日本の猫\u2028 🐈"]
    for name in names:
        paint(folder / name)
    found = []
    for form in ("jsonl", "csv", "parquet"):
        table = folder / f"metadata.{form}"
        if form == "jsonl":
            rows_to(table, *({"file_name": n, "text": t, "id": 3} for n, t in zip(names, texts, strict=True)))
        elif form == "csv":
            lines = [
                "\ufefffile_name,text,id",
                '"ä.png","Ein Bär, ""süß""",3',
                "sub/b.JPG,日本の猫\u2028 🐈,3\n",
            ]
            table.write_text("\n".join(lines), encoding="utf-8")
        else:
            pq.write_table(pa.table({"file_name": names, "text": texts, "id": [3, 3]}), table)
        found.append(load_images(config(folder)))
        table.unlink()
    assert captions_of(found[0]) == {"sub/b.JPG": (texts[1],), "ä.png": (texts[0],)}
    assert found[0].rows == found[1].rows == found[2].rows
    assert len({images.fingerprint for images in found}) == 1
    assert found[0].ignored == []


def test_caption_files_and_strays(folder):
    filled(folder, 2)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", ".hidden.png", ".ipynb_checkpoints/000.png", "a.psd"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    images = load_images(config(folder))
    assert captions_of(images) == {f"00{i}.png": (f"picture {i}, red, blue, green",) for i in range(2)}
    expected = [".DS_Store", ".hidden.png", ".ipynb_checkpoints/", "Thumbs.db", "a.psd", "notes.txt"]
    assert images.ignored == expected
    assert images.read(1) == folder / "001.png"
    assert (images.rows[0].width, images.rows[0].height) == (24, 16)


def test_one_caption_for_all_and_none_at_all(folder):
    paint(folder / "a.png")
    assert load_images(config(folder, caption="a heart")).rows[0].captions == ("a heart",)
    assert load_images(config(folder), captions=False).rows[0].captions == ()


def test_lists_of_captions_and_the_only_other_column(folder):
    paint(folder / "a.png")
    rows_to(folder / "metadata.jsonl", {"file_name": "a.png", "blip": ["one", " two "]})
    assert load_images(config(folder)).rows[0].captions == ("one", "two")


def test_metadata_of_subfolders(folder):
    for part in ("x", "y"):
        paint(folder / part / "a.png")
        rows_to(folder / part / "metadata.jsonl", {"file_name": "a.png", "text": part})
    assert captions_of(load_images(config(folder))) == {"x/a.png": ("x",), "y/a.png": ("y",)}


def test_names_are_found_however_accents_are_composed(folder):
    paint(folder / "a\u0301.png")  # as macOS writes it
    rows_to(folder / "metadata.jsonl", {"file_name": "\xe1.png", "text": "x"})
    assert captions_of(load_images(config(folder))) == {"\xe1.png": ("x",)}


def test_a_saved_dataset(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    filled(folder, 3)
    (folder / "bad.png").write_bytes(b"<html>")
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.List(datasets.Value("string"))})
    table = datasets.Dataset.from_dict(
        {
            "picture": [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.glob("*.png"))],
            "label": [["a", "b"], ["c"], ["d"], ["e"]],
        },
        features=features,
    )
    datasets.DatasetDict({"train": table.select(range(3)), "all": table}).save_to_disk(tmp_path / "saved")
    fields = {"image_column": "picture"}
    images = load_images(config(tmp_path / "saved", **fields))
    assert [row.captions for row in images.rows] == [("a", "b"), ("c",), ("d",)]
    assert images.read(2) == (folder / "002.png").read_bytes()
    alone = load_images(config(folder, caption="x", on_bad_image="skip"))
    assert [row.sha256 for row in images.rows] == [row.sha256 for row in alone.rows]
    again = pickle.loads(pickle.dumps(images))
    assert again.read(0) == images.read(0)
    stream = Stream(config(tmp_path / "saved", **fields), images, 4)
    assert stream.pixels(stream[0]).shape == (3, 16, 16)

    assert "no such column" in refusal(tmp_path / "saved")
    assert "picture, label" in refusal(tmp_path / "saved")
    assert "holds no images" in refusal(tmp_path / "saved", image_column="label")
    assert "it has train, all" in refusal(tmp_path / "saved", split="test", **fields)
    assert "it has picture, label" in refusal(tmp_path / "saved", caption_column="text", **fields)
    assert "row 3: a web page" in refusal(tmp_path / "saved", split="all", **fields)
    assert load_images(config(tmp_path / "saved", split="all", on_bad_image="skip", **fields)).skipped


def test_null_images_and_captions_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    content = paint(tmp_path / "a.png").read_bytes()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": content, "path": None}, None], "text": ["x", None]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    assert "row 1: the caption is missing" in refusal(tmp_path / "saved")
    assert "row 1: an empty file" in refusal(tmp_path / "saved", caption="x")


def test_a_copy_of_a_hub_repository(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = {"bytes": paint(tmp_path / "a.png").read_bytes(), "path": None}
    table = datasets.Dataset.from_dict({"image": [image] * 2, "text": ["x", "y"]})
    (tmp_path / "copy" / "data").mkdir(parents=True)
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "copy" / "data" / "train-0-of-1.parquet")
    images = load_images(config(tmp_path / "copy", cache_dir=tmp_path / "cache"))
    assert [row.captions for row in images.rows] == [("x",), ("y",)]


def test_a_snapshot_in_the_hubs_cache(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to(paint(tmp_path / "datasets--a--b" / "blobs" / "a.png"))
    (snapshot / "b.png").symlink_to(paint(tmp_path / "b.png"))
    rows_to(snapshot / "metadata.jsonl", *({"file_name": name, "text": "x"} for name in ("a.png", "b.png")))
    said = refusal(snapshot)
    assert "b.png -> " in said
    assert "a.png" not in said


def test_a_name_that_is_no_text(folder):
    path = paint(folder / "a.png")
    path.rename(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    images = load_images(config(folder, caption="x"))
    assert images.rows[0].name == "\\xff.png"
    assert len(images.fingerprint) == 64


def test_max_train_samples_is_drawn_with_the_seed(folder):
    filled(folder, 40)

    def drawn(**fields):
        return [row.name for row in load_images(config(folder, max_train_samples=10, **fields)).rows]

    assert len(drawn()) == 10
    assert drawn() == drawn() == sorted(drawn())
    assert drawn() != drawn(seed=1)
    images = load_images(config(folder, max_train_samples=10, seed=2))  # ten that no run has looked at before
    for index, row in enumerate(images.rows):
        assert images.read(index) == folder / row.name
        assert row.sha256 == hashlib.sha256((folder / row.name).read_bytes()).hexdigest()


def test_the_fingerprint_tells_datasets_apart(folder, tmp_path):
    filled(folder, 3)
    first = load_images(config(folder)).fingerprint
    folder = folder.rename(tmp_path / "elsewhere")
    assert load_images(config(folder)).fingerprint == first
    (folder / "001.txt").write_text("another")
    second = load_images(config(folder)).fingerprint
    paint(folder / "001.png", shade=99)
    third = load_images(config(folder)).fingerprint
    assert len({first, second, third}) == 3


# ---- what was probed before


def test_files_are_read_once_and_again_when_they_change(folder, monkeypatch):
    filled(folder, 4)
    looked = []
    look = image_info.inspect_image
    monkeypatch.setattr(image_info, "inspect_image", lambda data: looked.append(data.name) or look(data))
    first = load_images(config(folder))
    assert sorted(looked) == ["000.png", "001.png", "002.png", "003.png"]
    assert load_images(config(folder)).rows == first.rows
    assert len(looked) == 4
    kept = (folder / "002.png").stat()
    content = bytearray((folder / "002.png").read_bytes())
    content[-1] ^= 1  # of the same size, and made to look as old: the checksum of the end mark
    (folder / "002.png").write_bytes(content)
    os.utime(folder / "002.png", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert load_images(config(folder)).rows[2].sha256 != first.rows[2].sha256
    assert looked[4:] == ["002.png"]


def test_what_no_process_had_in_its_share_is_inspected_by_each(folder, monkeypatch):
    """Processes on machines whose caches differ. One that has failed asks none of the others."""
    filled(folder, 4)
    whole = load_images(config(folder)).rows
    (memo,) = (cache_root() / "probes").iterdir()
    looked, asked = [], []
    look = image_info.inspect_image
    monkeypatch.setattr(image_info, "inspect_image", lambda data: looked.append(data.name) or look(data))
    two = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(image_info, "distributed", two)
    monkeypatch.setattr(image_info, "store_barrier", lambda: None)
    monkeypatch.setattr(image_info, "gather_object", lambda own: asked.append(list(own[0])) or [{}, *own])
    memo.unlink()
    assert load_images(config(folder)).rows == whole
    assert [sorted(looked[:2]), sorted(looked[2:])] == [["001.png", "003.png"], ["000.png", "002.png"]]
    memo.unlink()
    with parted():
        assert load_images(config(folder)).rows == whole
    assert [len(own) for own in asked if own] == [2]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1, "probes": {"a": 3}}', b"\xff\x00"])
def test_a_corrupt_memo_is_made_anew(folder, content):
    filled(folder, 2)
    rows = load_images(config(folder)).rows
    (memo,) = (cache_root() / "probes").iterdir()
    good = memo.read_bytes()
    memo.write_bytes(content)
    assert load_images(config(folder)).rows == rows
    assert memo.read_bytes() == good


def test_a_bad_file_is_looked_at_again(folder):
    filled(folder, 2)
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[:50])
    assert "001.png" in refusal(folder)
    (folder / "001.png").write_bytes(whole)
    assert len(load_images(config(folder)).rows) == 2


def test_concurrent_runs_and_nowhere_to_write(folder, monkeypatch, tmp_path):
    filled(folder, 8)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_images(config(folder)).fingerprint, range(8)))
    assert len(set(found)) == 1
    assert not list(cache_root().rglob("*.tmp"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "file"))
    assert load_images(config(folder)).fingerprint == found[0]


# ---- bad input


def test_a_missing_folder(folder, tmp_path):
    said = refusal(tmp_path / "pictuers")
    assert "no such folder; did you mean" in said
    assert str(folder) in said
    assert "save_to_disk" in said
    assert "no such folder" in refusal("./nowhere")
    assert "no such folder" in refusal("nowhere")
    assert "did you mean tiny-hearts?" in refusal("tiny_hearts")
    assert "not a folder" in refusal(paint(tmp_path / "a.png"))


def test_an_unreachable_hub_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    said = refusal("user/name")
    assert "user/name cannot be loaded: Couldn't reach the Hub, and there is no such folder" in said
    assert "\n" not in said


def test_a_hub_dataset_is_asked_for_as_configured(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset_builder(*args, **options):
        asked.append((args, options))
        image = {"bytes": paint(tmp_path / "a.png").read_bytes(), "path": None}
        table = datasets.Dataset.from_dict({"image": [image], "text": ["x"]})
        made = datasets.DatasetDict({"train": table.cast_column("image", datasets.Image())})
        config = SimpleNamespace(data_files={"train": ["hf://datasets/user/name@abc/train.parquet"]})
        return SimpleNamespace(config=config, download_and_prepare=lambda: None, as_dataset=lambda: made)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    fields = {"dataset_config_name": "small", "dataset_revision": "abc", "cache_dir": tmp_path}
    assert load_images(config("user/name", **fields)).rows[0].captions == ("x",)
    assert asked == [(("user/name", "small"), {"revision": "abc", "cache_dir": str(tmp_path)})]


def test_no_images(folder):
    (folder / ".a.png").write_bytes(b"")
    (folder / "a.psd").write_bytes(b"")
    said = refusal(folder)
    assert str(folder) in said
    assert "apng, avif, bmp, gif, heic, heif, jfif, jpeg, jpg, png, tif, tiff, webp" in said


def test_no_captions(folder):
    paint(folder / "a.png")
    said = refusal(folder)
    assert "metadata.jsonl" in said
    assert "a.txt" in said
    assert "--caption" in said


def test_some_without_caption_files_are_all_named(folder):
    filled(folder, 4)
    (folder / "001.txt").unlink()
    (folder / "002.txt").write_text(" \n")
    (folder / "003.txt").write_bytes("café".encode("latin-1"))
    said = refusal(folder)
    assert "001.png: no 001.txt" in said
    assert "002.txt: the caption is empty" in said
    assert "003.txt: line 1 is not UTF-8" in said
    assert "000" not in said
    assert "--caption-column text: " in refusal(filled(folder, 4), caption_column="text")


BAD_ROWS = {
    '{"file_name": "a.png", "text": null}': "metadata.jsonl:2: the caption is missing",
    '{"file_name": "a.png"}': "metadata.jsonl:2: the caption is missing",
    '{"file_name": "a.png", "text": 7}': "metadata.jsonl:2: the caption is 7, which is not text",
    '{"file_name": "a.png", "text": {"b": 1}}': "metadata.jsonl:2: the caption is an object, which",
    '{"file_name": "a.png", "text": " "}': "metadata.jsonl:2: the caption is empty",
    '{"file_name": "a.png", "text": []}': "metadata.jsonl:2: the list of captions is empty",
    '{"file_name": "a.png", "text": ["x", null]}': "metadata.jsonl:2: the caption is missing",
    '{"file_name": "a.png", "text": "\\ud83d"}': "metadata.jsonl:2: the caption holds half a character",
    '{"text": "x"}': "metadata.jsonl:2: file_name is missing",
    '{"file_name": 3, "text": "x"}': "metadata.jsonl:2: file_name is missing",
    '{"file_name": "gone.png", "text": "x"}': "metadata.jsonl:2: there is no image gone.png",
    '{"file_name": "aa.png", "text": "x"}': "there is no image aa.png; did you mean a.png?",
    '{"file_name": "000.png", "text": "x"}': "metadata.jsonl:2: 000.png has a row already at",
    '{"file_name": "sub/../000.png", "text": "x"}': "metadata.jsonl:2: 000.png has a row already",
    '{"file_name": "../outside.png", "text": "x"}': "metadata.jsonl:2: ../outside.png is outside of the dataset folder",
    '{"file_name": "/etc/passwd", "text": "x"}': "metadata.jsonl:2: /etc/passwd is outside of the dataset folder",
    '{"file_name": "C:\\\\x.png", "text": "x"}': "metadata.jsonl:2: C:\\x.png is outside of the dataset folder",
    '{"file_name": "https://a.b/c.png", "text": "x"}': "metadata.jsonl:2: https://a.b/c.png is a URL",
    '{"file_name": "pipe.png", "text": "x"}': "metadata.jsonl:2: there is no image pipe.png",
    '{"file_name": "a.psd", "text": "x"}': "metadata.jsonl:2: a.psd is not one of apng",
    '{"file_name": "a\\u0000.png", "text": "x"}': "metadata.jsonl:2: there is no image",
    '{"file_name": "a.png", "text": "x"': "metadata.jsonl:2: not JSON",
    "[" * 100_000: "metadata.jsonl:2: not JSON",
    '["a.png", "x"]': "metadata.jsonl:2: not an object",
    "": "a.png: no row in metadata.jsonl",
}


@pytest.mark.parametrize(("row", "said"), BAD_ROWS.items(), ids=BAD_ROWS.values())
def test_each_bad_row_is_named_by_file_and_line(folder, row, said):
    paint(folder / "000.png")
    paint(folder / "a.png", shade=1)
    os.mkfifo(folder / "pipe.png")
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "000.png", "text": "x"}}\n{row}\n')
    assert said in refusal(folder)


def test_all_bad_rows_are_named_at_once_and_many_are_counted(folder):
    paint(folder / "a.png")
    lines = ['{"file_name": "a.png", "text": "x"}', "{", '{"file_name": "b.png", "text": "x"}', "[]"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    said = refusal(folder)
    assert all(f"metadata.jsonl:{line}:" in said for line in (2, 3, 4))
    rows_to(folder / "metadata.jsonl", *({"file_name": f"{i}.png", "text": "x"} for i in range(40)))
    said = refusal(folder)
    assert "... and 31 more" in said  # 40 rows and an image without one, ten of them shown
    assert len(said.splitlines()) == 12


def test_bad_csv(folder):
    paint(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a cat, sitting\n")
    assert "metadata.csv:2: 3 cells for 2 columns; put a caption with commas in quotes" in refusal(folder)
    (folder / "metadata.csv").write_text('file_name,text\na.png,"a cat\nb.png,x\n')
    assert "metadata.csv:2: unexpected end of data" in refusal(folder)
    (folder / "metadata.csv").write_text('file_name,text\na.png,"two\nlines"\nb.png,\n')
    assert "metadata.csv:4: there is no image b.png" in refusal(folder)
    (folder / "metadata.csv").write_text("file_name,text\na.png,NA\n")
    assert load_images(config(folder)).rows[0].captions == ("NA",)
    (folder / "metadata.csv").write_text("file_name,text\na.png,\n")
    assert "metadata.csv:2: the caption is empty" in refusal(folder)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\n")
    assert "metadata.csv: line 2 is not UTF-8" in refusal(folder)
    (folder / "metadata.csv").write_text("")
    assert "metadata.csv: no rows" in refusal(folder)
    (folder / "metadata.csv").unlink()
    (folder / "metadata.parquet").write_text("nonsense")
    assert "metadata.parquet: " in refusal(folder)


def test_unknown_columns_are_answered_with_those_there_are(folder):
    paint(folder / "a.png")
    rows_to(folder / "metadata.jsonl", {"file_name": "a.png", "blip": "x", "tags": "y"})
    assert "it has file_name, blip, tags" in refusal(folder, caption_column="text")
    assert "--caption-column" in refusal(folder)
    assert load_images(config(folder, caption_column="tags")).rows[0].captions == ("y",)
    rows_to(folder / "metadata.jsonl", {"image": "a.png", "text": "x"})
    assert "no column file_name" in refusal(folder)
    rows_to(folder / "metadata.jsonl", {"file_name": "a.png"})
    assert "has no captions" in refusal(folder)


def test_bad_images_are_all_named_or_left_out(folder):
    filled(folder, 5)
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    (folder / "003.png").write_bytes(b"<html>no</html>")
    said = refusal(folder)
    assert "2 of 5 images cannot be used" in said
    assert "--on-bad-image skip" in said
    assert "001.png: truncated" in said
    assert "003.png: a web page" in said
    images = load_images(config(folder, on_bad_image="skip"))
    assert [row.name for row in images.rows] == ["000.png", "002.png", "004.png"]
    assert [name for name, _ in images.skipped] == ["001.png", "003.png"]
    assert images.read(1).name == "002.png"
    lines = summarize(Stream(config(folder, on_bad_image="skip"), images, 2))
    assert any("left out: 2 (001.png: truncated" in line for line in lines)


def test_nothing_but_bad_images(folder):
    paint(folder / "a.png").write_bytes(b"")
    assert "a.png: an empty file" in refusal(folder, caption="x", on_bad_image="skip")


def test_small_images(folder):
    paint(folder / "fine.png", (16, 40))
    paint(folder / "small.png", (5, 40))
    cfg = config(folder, caption="x")
    (line,) = (line for line in summarize(Stream(cfg, load_images(cfg), 1)) if "smaller" in line)
    assert "1 (the smallest is small.png, 5 x 40)" in line
    paint(folder / "tiny.png", (3, 40))
    said = refusal(folder, caption="x")
    assert "tiny.png: 3 x 40 is less than a quarter of 16 x 16" in said
    assert "small.png" not in said
    skipped = load_images(config(folder, caption="x", on_bad_image="skip")).skipped
    assert [name for name, _ in skipped] == ["tiny.png"]


# ---- order


def stream_of(folder, group=4, **fields):
    cfg = config(folder, **fields)
    return Stream(cfg, load_images(cfg), group)


def test_each_epoch_is_another_permutation_without_a_seam(folder):
    stream = stream_of(filled(folder, 7))
    epochs = [[stream[p].index for p in range(7 * e, 7 * e + 7)] for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert stream.epoch_length == 7
    other_group = stream_of(folder, group=5)
    assert [other_group[p] for p in range(28)] == [stream[p] for p in range(28)]
    other_seed = stream_of(folder, seed=1)
    assert [other_seed[p].index for p in range(7)] != epochs[0]


def test_repeats(folder):
    stream = stream_of(filled(folder, 3), repeats=4)
    assert stream.epoch_length == 12
    for epoch in range(2):
        counts = Counter(stream[p].index for p in range(12 * epoch, 12 * epoch + 12))
        assert counts == {0: 4, 1: 4, 2: 4}


def test_fewer_images_than_a_batch(folder):
    stream = stream_of(filled(folder, 1), group=8)
    assert [stream[p].index for p in range(20)] == [0] * 20
    stream = stream_of(folder, group=8, buckets=True)
    assert [stream[p].index for p in range(20)] == [0] * 20


SIZES = ((24, 16), (16, 24), (32, 32), (24, 16), (24, 16))


def test_a_step_has_one_shape_and_the_first_round_shows_all(folder):
    stream = stream_of(filled(folder, 13, SIZES), group=4, buckets=True, resolution=32)
    assert len(stream.buckets) == 3
    steps_of_a_round = sum(-(-len(held) // 4) for held in stream.buckets.values())
    orders = []
    for round_ in range(3):
        seen, order = set(), []
        for step in range(round_ * steps_of_a_round, (round_ + 1) * steps_of_a_round):
            samples = [stream[4 * step + j] for j in range(4)]
            assert len({(sample.width, sample.height) for sample in samples}) == 1
            order.append(samples[0].width)
            seen |= {sample.index for sample in samples}
        assert round_ or seen == set(range(13))
        orders.append(tuple(order))
    assert len(set(orders)) > 1


def test_the_stream_of_a_bucket_is_seamless(folder):
    stream = stream_of(filled(folder, 13, SIZES), group=4, buckets=True, resolution=32)
    samples = [stream[p] for p in range(4 * 200)]
    for shape, held in stream.buckets.items():
        shown = [sample.index for sample in samples if (sample.width, sample.height) == shape]
        for start in range(0, len(shown) - len(held), len(held)):
            assert sorted(shown[start : start + len(held)]) == held


def test_positions_in_any_order_and_after_pickling_give_the_same(folder):
    fields = {
        "buckets": True,
        "random_flip": True,
        "center_crop": False,
        "shuffle_tags": True,
        "caption_dropout": 0.3,
        "resolution": 32,
    }
    stream = stream_of(filled(folder, 13, SIZES), **fields)
    forwards = [stream[p] for p in range(100)]
    assert [stream[p] for p in reversed(range(100))] == forwards[::-1]
    again = pickle.loads(pickle.dumps(stream_of(folder, **fields)))
    assert [again[p] for p in range(100)] == forwards
    assert torch.equal(again.pixels(again[5]), stream.pixels(stream[5]))


class Pixels(torch.utils.data.Dataset):
    def __init__(self, stream):
        self.stream = stream

    def __getitem__(self, position):
        sample = self.stream[position]
        return position, sample.caption, self.stream.pixels(sample)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_change_nothing(folder, context):
    stream = stream_of(filled(folder, 5), random_flip=True, center_crop=False, caption_dropout=0.5)
    batches = positions(2, 3, batch=2, accumulation=2, rank=0, world=1)
    loader = torch.utils.data.DataLoader(
        Pixels(stream), batch_sampler=batches, num_workers=1, multiprocessing_context=context
    )
    for (number, captions, pixels), batch in zip(loader, batches, strict=True):
        assert number.tolist() == batch
        for i, position in enumerate(batch):
            assert captions[i] == stream[position].caption
            assert torch.equal(pixels[i], stream.pixels(stream[position]))


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_any_cut_of_a_step_sees_the_same_positions(batch, accumulation, world):
    cuts = [list(positions(3, 5, batch, accumulation, rank, world)) for rank in range(world)]
    assert all(len(cut) == 5 * accumulation for cut in cuts)
    assert all(len(micro) == batch for cut in cuts for micro in cut)
    for step in range(5):
        of_step = [p for cut in cuts for micro in cut[step * accumulation :][:accumulation] for p in micro]
        assert sorted(of_step) == list(range((3 + step) * 8, (4 + step) * 8))
    assert len(positions(3, 5, batch, accumulation, 0, world)) == 5 * accumulation


# ---- draws


def test_draws_are_spread_and_independent(folder):
    stream = stream_of(filled(folder, 4), random_flip=True, center_crop=False, caption_dropout=0.25)
    samples = [stream[p] for p in range(2000)]
    assert 0.45 < np.mean([sample.flip for sample in samples]) < 0.55
    assert 0.22 < np.mean([sample.caption == "" for sample in samples]) < 0.28
    lefts = np.array([sample.left for sample in samples])
    assert 0.47 < lefts.mean() < 0.53
    assert lefts.min() < 0.01 < 0.99 < lefts.max()
    columns = [lefts, [s.top for s in samples], [s.flip for s in samples], [s.caption == "" for s in samples]]
    assert abs(np.corrcoef(columns) - np.eye(4)).max() < 0.1


def test_an_option_moves_no_other_draw(folder):
    plain = stream_of(filled(folder, 5), random_flip=True)
    more = stream_of(folder, random_flip=True, center_crop=False, caption_dropout=0.5, shuffle_tags=True)
    assert [plain[p].index for p in range(50)] == [more[p].index for p in range(50)]
    assert [plain[p].flip for p in range(50)] == [more[p].flip for p in range(50)]


def test_without_options_every_sample_is_plain(folder):
    stream = stream_of(filled(folder, 3))
    for position in range(9):
        sample = stream[position]
        assert (sample.left, sample.top, sample.flip) == (0.5, 0.5, False)
        assert sample.caption == f"picture {sample.index}, red, blue, green"


def test_captions_of_a_list_take_turns(folder):
    paint(folder / "a.png")
    rows_to(folder / "metadata.jsonl", {"file_name": "a.png", "text": ["one", "two", "three"]})
    stream = stream_of(folder)
    counts = Counter(stream[p].caption for p in range(300))
    assert set(counts) == {"one", "two", "three"}
    assert min(counts.values()) > 70
    assert stream.texts() == ["", "one", "three", "two"]


def test_tags_are_shuffled_behind_those_kept(folder):
    stream = stream_of(filled(folder, 1), shuffle_tags=True, keep_tags=1)
    seen = {stream[p].caption for p in range(100)}
    assert len(seen) == 6
    assert all(caption.startswith("picture 0, ") for caption in seen)
    assert {frozenset(caption.split(", ")) for caption in seen} == {frozenset({"picture 0", "red", "blue", "green"})}
    assert "shuffled" in stream.text_cacheable
    assert stream_of(folder, shuffle_tags=True, keep_tags=3).text_cacheable is None


def test_holdout(folder):
    stream = stream_of(
        filled(folder, 9),
        num_holdout_images=3,
        random_flip=True,
        center_crop=False,
        caption_dropout=0.9,
        shuffle_tags=True,
    )
    held = {sample.index for sample in stream.holdout}
    assert len(held) == 3
    assert held | set(stream.indices) == set(range(9))
    assert {stream[p].index for p in range(60)} == set(stream.indices)
    assert stream.epoch_length == 6
    for sample in stream.holdout:
        assert (sample.left, sample.top, sample.flip) == (0.5, 0.5, False)
        assert sample.caption == f"picture {sample.index}, red, blue, green"
    again = stream_of(folder, num_holdout_images=3)
    assert [sample.index for sample in again.holdout] == sorted(held)
    with pytest.raises(UserError, match=r"--num-holdout-images 9 .* has 9 usable images"):
        stream_of(folder, num_holdout_images=9)


def test_an_image_that_vanishes_is_named(folder):
    stream = stream_of(filled(folder, 1))
    (folder / "000.png").unlink()
    with pytest.raises(UserError, match=r"000\.png"):
        stream.pixels(stream[0])


# ---- shapes


@pytest.mark.parametrize(("resolution", "step", "aspect"), [(512, 64, 2.0), (64, 8, 2.0), (500, 64, 3.0), (64, 64, 2)])
def test_shapes_keep_their_bounds(resolution, step, aspect):
    found = bucket_shapes(resolution, step, aspect)
    assert len(set(found)) == len(found)
    for width, height in found:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) / min(width, height) <= aspect
        assert (height, width) in found
    side = resolution // step * step
    assert nearest_shape(found, 700, 700) == (side, side)


def test_known_shapes():
    assert set(bucket_shapes(512, 64, 2.0)) == {
        *((512, 512), (448, 512), (512, 448), (448, 576), (576, 448), (384, 640), (640, 384))
    }
    assert nearest_shape(bucket_shapes(512, 64, 2.0), 3000, 2000) == (640, 384)
    assert nearest_shape(bucket_shapes(512, 64, 2.0), 300, 4000) == (384, 640)


def test_a_step_larger_than_the_resolution_is_refused(folder):
    assert "--bucket-step 64" in refusal(filled(folder, 1), buckets=True, bucket_step=64)


# ---- what can be cached


def keys_drawn(stream, count=200):
    return {stream.pixel_key(stream[p]) for p in range(count)}


def test_variants_cover_what_is_drawn(folder):
    stream = stream_of(filled(folder, 6), random_flip=True, num_holdout_images=2)
    assert stream.pixels_cacheable is None
    assert stream.text_cacheable is None
    variants = [sample for sample, _ in stream.pixel_variants().values()]
    keys = [stream.pixel_key(sample) for sample in variants]
    assert keys == list(stream.pixel_variants())
    assert len(variants) == len(set(keys)) == 4 * 2 + 2
    assert set(keys) == keys_drawn(stream) | {stream.pixel_key(sample) for sample in stream.holdout}
    pixels = {stream.pixel_key(sample): stream.pixels(sample) for sample in variants}
    assert all(torch.equal(stream.pixels(stream[p]), pixels[stream.pixel_key(stream[p])]) for p in range(20))
    assert {stream[p].caption for p in range(50)} <= set(stream.texts())


def test_random_crops_refuse_the_cache_only_where_there_is_slack(folder):
    filled(folder, 2, sizes=((24, 16),))
    assert "--center-crop" in stream_of(folder, center_crop=False).pixels_cacheable
    assert len(keys_drawn(stream_of(folder, center_crop=False))) > 4
    square = folder.parent / "square"
    square.mkdir()
    filled(square, 2, sizes=((40, 40),))
    stream = stream_of(square, center_crop=False)
    assert stream.pixels_cacheable is None
    assert keys_drawn(stream) == set(stream.pixel_variants())


def test_keys_tell_apart_what_differs(folder):
    filled(folder, 1, sizes=((40, 24),))

    def key(**fields):
        stream = stream_of(folder, **fields)
        return stream.pixel_key(stream[0])

    keys = {key(), key(resolution=24), key(image_interpolation_mode="box"), key(center_crop=False)}
    assert len(keys | {key(resolution=24, buckets=True)}) == 5
    assert key() == key(seed=5)


# ---- the report


def test_the_report_of_a_mixed_folder(folder):
    filled(folder, 5, sizes=((24, 16), (24, 16), (24, 16), (24, 16), (16, 16)))
    (folder / "copy.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "copy.txt").write_text("one two three four five six")
    (folder / "README.md").write_text("")
    cfg = config(folder, buckets=True, resolution=24, bucket_step=8)
    lines = summarize(Stream(cfg, load_images(cfg), 4), count_words, 5)
    alone = "a step has one shape, so images of the last one are shown 4 times an epoch"
    assert lines == [
        "images: 6; an epoch is 1.5 steps of 4 images",
        "other files, ignored: 1 (README.md)",
        f"buckets: 32 x 16: 5, 24 x 24: 1; {alone}",
        "images that lose more than 3 % when cropped: 5 (most copy.png, 25%); "
        "a larger --bucket-max-aspect or a smaller --bucket-step keeps more",
        "images smaller than their training shape, enlarged: 6 (the smallest is 004.png, 16 x 16)",
        "exact copies of other images, which are therefore shown more often: 1",
        "captions over the text encoder's 5 tokens: 1, 1 tokens lost (longest copy.png: 6)",
    ]


def test_a_clean_folder_has_a_short_report(folder):
    whole = filled(folder, 4, sizes=((16, 16),))
    assert summarize(stream_of(whole, group=2), count_words, 77) == ["images: 4; an epoch is 2 steps of 2 images"]


def test_the_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.delenv("SDTUNE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "sdtune"


def test_a_drawn_dataset_of_other_code_is_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    folders = []
    for name, shade in (("first_drawing", 1), ("second_drawing", 2)):
        (tmp_path / f"{name}.py").write_text(
            "from PIL import Image\n\ndef draw(folder):\n    folder.mkdir(parents=True)\n"
            f"    Image.new('L', (8, 8), {shade}).save(folder / '0.png')\n"
        )
        draw = importlib.import_module(name).draw
        folders += [builtin._drawn("dots", draw), builtin._drawn("dots", draw)]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert Image.open(folders[3] / "0.png").getpixel((0, 0)) == 2
