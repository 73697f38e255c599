"""Tables of images as other tools write them; none of them reads a file of this machine."""

import pyarrow
import pyarrow.parquet
import pytest

from sdtune.config.sections import UserError
from sdtune.data import load_images, open_images
from sdtune.data.folder_files import refuse_files_outside
from tests.image_folders import captions, config, names, paint, refusal, write
from tests.tars import drawn, pack

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


def told(folder, **fields):
    """What is said of a dataset that is refused, whether it is streamed or not."""
    with pytest.raises(UserError) as caught:
        open_images(config(folder, **fields))
    return str(caught.value)


@pytest.mark.fault("A README.md of a dataset names files of the machine", "Refused; they are not read.")
def test_a_dataset_names_no_file_outside(tmp_path, content):
    private, folder = tmp_path / "elsewhere", tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for table in (private / "p.parquet", folder / "data" / "train.parquet"):
        pandas.DataFrame({"image": [content], "text": [table.parent.name]}).to_parquet(table)
    for pattern in (f"{private}/*.png", "../elsewhere/p.parquet", f"{private}/p.parquet"):
        config_of = f"---\nconfigs:\n- config_name: default\n  data_files: '{pattern}'\n---\n"
        write(folder / "README.md", config_of)
        for streaming in (False, True):
            fields = {"caption": "x", "streaming": streaming, "follow_links": True, "cache_dir": tmp_path / "cache"}
            assert "which is outside of the dataset, so it is not read" in told(folder, **fields), pattern
    for file in ("/etc/hostname", "file:///etc/hostname", "zip://*.png::/home/a.zip"):
        with pytest.raises(UserError, match=r"user/name: it names .*, which is outside of the dataset"):
            refuse_files_outside("user/name", None, ["hf://datasets/user/name@1/a.parquet", file], True)


@pytest.mark.fault("A table or shard is a link out of the dataset's folder", "Refused; `--follow-links` reads it.")
def test_linked_tables_and_shards_are_refused_or_followed(tmp_path, content):
    private = tmp_path / "elsewhere"
    pandas.DataFrame({"image": [content], "text": ["x"]}).to_parquet(private / "train.parquet")
    pack(private / "0.tar", *drawn(0, 2))
    columns = {"image": [{"bytes": content, "path": None}], "text": ["x"]}
    saved = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    saved.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.rename(private / "saved.arrow")
    links = {tmp_path / "set" / "data" / "train.parquet": "train.parquet", tmp_path / "tars" / "0.tar": "0.tar"}
    for link, file in (links | {arrow: "saved.arrow"}).items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(private / file)
    for dataset, streaming in (
        (tmp_path / "set", False),
        (tmp_path / "set", True),
        (tmp_path / "tars", True),
        (tmp_path / "tars" / "*.tar", True),
        (tmp_path / "saved", False),
    ):
        fields = {"streaming": streaming, "cache_dir": tmp_path / "cache"}
        said = told(dataset, **fields)
        assert "links lead out of the dataset folder" in said and " -> " in said and "--follow-links" in said, dataset
        assert open_images(config(dataset, **fields, follow_links=True))
