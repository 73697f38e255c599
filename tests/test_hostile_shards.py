"""Tar shards that are made to harm: endless or nested captions, sparse members."""

import io
import json
import tarfile
import time

import pytest

from sdtune.config.sections import UserError
from sdtune.data import open_images
from tests.tars import drawn, pack
from tests.test_image_kinds import NOISE, animated, taller
from tests.test_streaming import config, stream


def shard(folder, **members):
    folder.mkdir()
    ((key, good),) = drawn(0, 1)
    pack(folder / "000000.tar", (key, good | members), *drawn(1, 3))
    return folder


@pytest.mark.fault(
    "A caption in a shard is nested a thousand times, or has megabytes", "Refused in a moment, by its name."
)
@pytest.mark.parametrize(
    ("members", "fields", "said"),
    [
        ({"txt": b"x" * 20_000_000}, {}, "its caption has 20,000,000 bytes"),
        ({"txt": b"x" * 100_000}, {}, "the caption has 100,000 characters"),
        ({"json": b"[" * 100_000, "txt": b""}, {"caption_column": "text"}, "its .json member is not a JSON object"),
        ({"json": json.dumps({"text": {"a": ["b"]}}).encode()}, {"caption_column": "text"}, "the caption is an object"),
        ({"json": b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}"}, {"caption_column": "text"}, "the caption is a list"),
    ],
)
def test_captions_are_bounded(tmp_path, members, fields, said):
    rest = {"json": b'{"text": "x"}'} if "json" in members else {}
    folder = tmp_path / "shards"
    folder.mkdir()
    (key, good), *others = drawn(0, 4)
    pack(folder / "000000.tar", (key, good | members), *((k, m | rest) for k, m in others))
    began = time.process_time()
    with pytest.raises(ValueError, match=said):
        open_images(config(folder, **fields)).get_open(0).record(0)
    assert time.process_time() - began < 5


@pytest.mark.fault("A shard claims a terabyte with a sparse member", "Refused by its name.")
def test_sparse_members_are_refused_by_name(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for ending, data in next(iter(drawn(0, 1)))[1].items():
            header = tarfile.TarInfo(f"a.{ending}")
            header.size = len(data)
            if ending == "png":
                header.pax_headers = {"GNU.sparse.map": f"0,{len(data)}", "GNU.sparse.size": str(10**12)}
            tar.addfile(header, io.BytesIO(data))
    with pytest.raises(UserError, match=r"a\.png is stored as a sparse file"):
        open_images(config(folder))


def test_animations_in_shards_are_bad_images(tmp_path):
    folder = shard(tmp_path / "shards", png=animated("GIF"))
    with pytest.raises(UserError, match="3 frames"):
        [stream(folder)[position] for position in range(8)]
    taken = stream(folder, first_frame=True)
    assert len({taken[p].name for p in range(16)}) == 4


def test_images_without_their_last_rows_are_bad_images(tmp_path):
    data = io.BytesIO()
    NOISE.save(data, "PNG")
    folder = shard(tmp_path / "shards", png=taller(data.getvalue(), "PNG"))
    with pytest.raises(UserError, match="its last pixels are missing"):
        [stream(folder)[position] for position in range(8)]


def test_a_caption_a_line(tmp_path):
    folder = shard(tmp_path / "shards", txt=b"a heart\n a  red heart\n")
    assert open_images(config(folder)).get_open(0).record(0).captions == ("a heart a red heart",)
    each = open_images(config(folder, caption_per_line=True)).get_open(0).record(0).captions
    assert each == ("a heart", "a red heart")
