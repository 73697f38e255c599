"""Tables of images as other tools write them; none of them reads a file of this machine."""

import pyarrow
import pyarrow.parquet
import pytest

from sdtune.data import load_images, open_images
from tests.image_folders import captions, config, names, paint, refusal, write

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")


@pytest.fixture
def content(tmp_path):
    return paint(tmp_path / "elsewhere" / "a.png").read_bytes()


@pytest.mark.parametrize("cells", ["bytes", "struct"])
@pytest.mark.parametrize("place", ["table.parquet", "default/train/0000.parquet", "data/train-0-of-1.parquet"])
def test_parquet_written_by_pandas(tmp_path, content, cells, place):
    cell = content if cells == "bytes" else {"bytes": content, "path": "a.png"}
    file = tmp_path / "data set" / place
    file.parent.mkdir(parents=True)
    pandas.DataFrame({"image": [cell, cell], "text": ["x", "y"]}).to_parquet(file)
    write(tmp_path / "data set" / "README.md", "A data set.\n")
    fields = {"cache_dir": tmp_path / "cache"}
    assert list(captions(load_images(config(tmp_path / "data set", **fields))).values()) == [("x",), ("y",)]
    if place == "table.parquet":
        assert len(load_images(config(file, **fields)).rows) == 2


def test_a_table_in_a_folder_of_images_is_not_the_dataset(tmp_path, content):
    paint(tmp_path / "a.png")
    pandas.DataFrame({"image": [content]}).to_parquet(tmp_path / "features.parquet")
    images = load_images(config(tmp_path, caption="x"))
    assert names(images) == ["a.png", "elsewhere/a.png"] and images.ignored == ["features.parquet"]


@pytest.mark.fault(
    "A parquet table names a file of the machine in place of an image",
    "It counts as a bad image; the file is not read.",
)
@pytest.mark.parametrize("path", ["/etc/hostname", "/dev/zero", "../elsewhere/a.png", "a.png"])
def test_a_path_in_a_table_is_never_read(tmp_path, content, path):
    rows = {"image": [{"bytes": None, "path": path}, {"bytes": content, "path": None}], "text": ["x", "y"]}
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(rows["image"], kind), "text": rows["text"]})
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    said = refusal(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert f"row 0: holds no image but a path, '{path}'" in said or "row 0: cannot be read (No such file" in said
    assert "row 1" not in said


def test_a_path_in_a_streamed_table_is_never_read(tmp_path):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array([{"bytes": None, "path": "/dev/zero"}], kind), "text": ["x"]})
    (tmp_path / "set" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(table, tmp_path / "set" / "data" / "train.parquet")
    shards = open_images(config(tmp_path / "set", streaming=True))
    assert shards.get_open(0).record(0).content == b""
