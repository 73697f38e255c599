"""What is done before training is shared out over the processes, and comes out as if one had done it."""

import json
import os
import shutil

import pytest

from sdtune.data import cache, image_info
from sdtune.recipes import class_images
from sdtune.run.processes import EXIT_PEER_DIED
from tests import ranks
from tests.contract import command

MADE = ["--prior-preservation", "--class-prompt", "a red circle", "--num-class-images", "6", "--sample-batch-size", "1"]


@pytest.mark.processes
def test_class_pictures_that_are_missing_are_shared_out_evenly(trained, places, tmp_path, monkeypatch):
    """Two processes have made theirs when the run is killed, and the third has made none."""
    once = [*MADE, "--class-inference-steps", "1", "--steps", "1", "--num-validation-images", "0"]
    whole = trained("dreambooth", "whole", *once, "--class-data", str(tmp_path / "one"))
    assert whole.exists()
    made = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert len(made) == 6
    two = tmp_path / "two"
    two.mkdir()
    for k in (0, 2, 3, 5):
        (two / f"made-{k:05d}.png").write_bytes(made[f"made-{k:05d}.png"])
    real = class_images.write
    monkeypatch.setattr(
        class_images, "write", lambda path, *more: (print(os.environ["RANK"], path.name), real(path, *more))
    )
    words = command("dreambooth", places, tmp_path / "run", *once, "--class-data", str(two), "--train-batch-size", "1")
    ranks.train(2, words, tmp_path / "output")
    drew = [(tmp_path / "output" / f"{rank}.out").read_text() for rank in range(2)]
    assert ["0 made-00001.png" in drew[0], "1 made-00004.png" in drew[1]] == [True, True]
    assert "made-00004.png" not in drew[0]
    assert {path.name: path.read_bytes() for path in two.iterdir()} == made


def alone_and_together(places, tmp_path, monkeypatch):
    """Train by one process and by two, each with a cache of its own; how many, and the lines that each printed."""
    for world in (1, 2):
        monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / f"cache-{world}"))
        cut = ["--steps", "1", "--train-batch-size", str(2 // world)]
        ranks.train(world, command("lora", places, tmp_path / f"run-{world}", *cut), tmp_path / f"output-{world}")
        files = [tmp_path / f"output-{world}" / f"{rank}.out" for rank in range(world)]
        yield world, [file.read_text().splitlines() for file in files]


@pytest.mark.processes
def test_captions_and_images_are_encoded_once_each(places, tmp_path, monkeypatch):
    """By one process or the other, of each store about half; what is kept is what one process keeps."""
    real = cache.write_tensors

    def told(file, tensors, *more):
        print(json.dumps([file.parent.parent.name, sorted(tensors)]))
        real(file, tensors, *more)

    monkeypatch.setattr(cache, "write_tensors", told)
    kept = {}
    for world, printed in alone_and_together(places, tmp_path, monkeypatch):
        shares = [[json.loads(line) for line in lines if line.startswith("[")] for lines in printed]
        done = [(store, key) for share in shares for store, keys in share for key in keys]
        assert len(done) == len(set(done))
        kept[world] = set(done)
        stores = {store for store, _ in done}
        assert len(stores) == 2
        for store in stores:
            sizes = [sum(len(keys) for name, keys in share if name == store) for share in shares]
            assert max(sizes) - min(sizes) <= 1
    assert kept[1] == kept[2]


@pytest.mark.processes
def test_images_are_inspected_once_each(places, tmp_path, monkeypatch):
    """By one process or the other, about half each; what is remembered is what one process remembers."""
    real = image_info.inspect_image
    monkeypatch.setattr(image_info, "inspect_image", lambda data: (print(f"looks at {data.name}"), real(data))[1])
    kept = {}
    for world, printed in alone_and_together(places, tmp_path, monkeypatch):
        shares = [[line for line in lines if line.startswith("looks at ")] for lines in printed]
        done = sorted(name for share in shares for name in share)
        assert len(done) == len(set(done)) > 2
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        (memo,) = (tmp_path / f"cache-{world}" / "probes").iterdir()
        kept[world] = done, json.loads(memo.read_text())
    assert kept[1] == kept[2]


@pytest.mark.processes
def test_bad_images_of_all_shares_are_named_once(places, pictures, tmp_path):
    """Each process finds one of them, and all stop."""
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    bad = sorted(copy.glob("*.png"))[:2]
    for image in bad:
        image.write_bytes(b"")
    words = command("lora", places, tmp_path / "run", "--dataset", str(copy), "--train-batch-size", "1")
    run = ranks.Ranks(2, words, tmp_path / "output")
    assert sorted(run.exit_codes()) == [2, EXIT_PEER_DIED]
    said = run.output("err")
    assert said.count("2 of ") == 1
    assert all(said.count(f"{image.name}: an empty file") == 1 for image in bad)
