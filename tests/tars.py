"""Small data sets in shards, drawn from the world of shapes."""

import io
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet

from sdtune.data import toy_world

UNEQUAL = (7, 1, 5, 9, 3)
"""Images of each shard."""


def pack(path, *samples):
    """A tar of ``(key, {ending: bytes})``."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for ending, data in members.items():
                header = tarfile.TarInfo(f"{key}.{ending}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def drawn(first, count):
    """Captioned pictures of flat shapes, as samples of a shard."""
    for number in range(first, first + count):
        draws = np.random.default_rng(number)
        scene = toy_world.random_scene(draws)
        text = toy_world.random_caption(scene, draws)
        yield f"{number:06}", {"png": png(toy_world.render(scene, 64, 72)), "txt": text.encode()}


def unequal(folder):
    """Twenty-five captioned pictures in five tars of unequal length."""
    folder.mkdir()
    for shard, count in enumerate(UNEQUAL):
        pack(folder / f"{shard:06}.tar", *drawn(sum(UNEQUAL[:shard]), count))
    return folder


def parquet(folder):
    """Twenty-four captioned pictures as a Hub data set: two files of three row groups."""
    (folder / "data").mkdir(parents=True)
    for k in range(2):
        rows = [
            {"image": {"bytes": members["png"], "path": f"{key}.png"}, "text": members["txt"].decode()}
            for key, members in drawn(k * 12, 12)
        ]
        file = folder / "data" / f"train-{k:05}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=4)
    return folder
