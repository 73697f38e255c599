"""What is wrong with shards and with the images in them: named before training, or when it is met, or left out."""

import gc
import json
import pickle
import shutil
import tarfile
from functools import partial

import pytest
from PIL import Image

from sdtune.config.sections import UserError
from sdtune.data import open_images
from tests.conftest import status
from tests.tars import drawn, pack, png, unequal
from tests.test_streaming import command, config, stream


@pytest.fixture
def lora(sd):
    return partial(command, sd)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return unequal(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def copy(tars, tmp_path):
    """Those tars, to spoil."""
    return shutil.copytree(tars, tmp_path / "shards")


# ---- bad images


def test_a_bad_image_is_told_when_it_is_met(lora, copy, tmp_path, capsys):
    samples = list(drawn(8, 5))
    samples[2][1]["png"] = samples[2][1]["png"][:300]
    pack(copy / "000002.tar", *samples)
    assert status(lora(copy, tmp_path / "run", "--dataloader-num-workers", "2", "--steps", "12")) == 2
    told = capsys.readouterr().err
    assert "000002.tar, image 2: 000002.tar/000010.png: truncated or corrupt" in told
    assert "--on-bad-image skip" in told and len(told.strip().splitlines()) == 1
    gc.collect()  # the loader's workers, which hold the lock of the folder
    again = lora(copy, tmp_path / "run", "--on-bad-image", "skip", "--allow-change", "--dataloader-num-workers", "0")
    assert status([*again, "--steps", "12"]) == 0


def test_the_next_image_is_shown_in_place_of_a_bad_one(copy):
    good = stream(copy)
    names = [good[p].name for p in range(60)]
    samples = list(drawn(8, 5))
    samples[4][1]["png"] = b"no image"
    samples[2][1]["txt"] = b"  "
    pack(copy / "000002.tar", *samples)
    bad = stream(copy, on_bad_image="skip", num_holdout_images=0)
    instead = {"000002.tar/000012.png": "000002.tar/000008.png", "000002.tar/000010.png": "000002.tar/000011.png"}
    assert instead.keys() <= set(names)
    assert [bad[p].name for p in range(60)] == [instead.get(name, name) for name in names]
    travelled = pickle.loads(pickle.dumps(bad))
    assert [travelled[p].name for p in reversed(range(60))] == [bad[p].name for p in reversed(range(60))]


def test_held_out_images_are_the_first_and_never_shown(copy):
    samples = list(drawn(0, 7))
    samples[6][1]["png"] = b"no image"  # the last of its shard: what comes after it are the held-out ones
    pack(copy / "000000.tar", *samples)
    shown = stream(copy, num_holdout_images=4, on_bad_image="skip")
    held = [sample.name for sample in shown.holdout]
    assert held == [f"000000.tar/{number:06}.png" for number in range(4)]
    assert not set(held) & {shown[p].name for p in range(120)}


# ---- what is wrong with shards


def refusal(dataset, **fields):
    with pytest.raises(UserError) as caught:
        open_images(config(dataset, **fields))
    return str(caught.value)


def spoil_gone(folder):
    (folder / "000003.tar").unlink()


def spoil_cut(folder):
    file = folder / "000001.tar"
    file.write_bytes(file.read_bytes()[:2000])


def spoil_header(folder):
    data = bytearray((folder / "000003.tar").read_bytes())
    at = data.index(b"000014.txt")
    data[at : at + 200] = bytes(range(1, 201))
    (folder / "000003.tar").write_bytes(data)


def spoil_end(folder):
    with tarfile.open(folder / "000003.tar") as tar:
        last = tar.getmembers()[-2]
    data = (folder / "000003.tar").read_bytes()
    (folder / "000003.tar").write_bytes(data[: last.offset])


def spoil_no_tar(folder):
    (folder / "000000.tar").write_bytes(b"<html>not found</html>" * 100)


def spoil_caption(folder):
    samples = list(drawn(0, 7))
    del samples[3][1]["txt"]
    pack(folder / "000000.tar", *samples)


def spoil_image(folder):
    samples = list(drawn(0, 7))
    del samples[6][1]["png"]
    pack(folder / "000000.tar", *samples)


def spoil_empty(folder):
    pack(folder / "000004.tar")


def spoil_two(folder):
    pack(folder / "000004.tar", ("a", {"png": png(Image.new("RGB", (64, 64))), "jpg": b"x", "txt": b"both"}))


@pytest.mark.fault("A tar shard is damaged, empty or mixed", "Refused in one line with its name.")
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_gone, "000003.tar: no such file"),
        (spoil_cut, "000001.tar: damaged or cut short at byte 1536; copy it again"),
        (spoil_header, "000003.tar: damaged or cut short at byte"),
        (spoil_end, "000003.tar: damaged or cut short at byte"),
        (spoil_no_tar, "000000.tar: not a complete tar file"),
        (spoil_caption, "000000.tar: 1 of 7 samples have no image or caption (.txt, or 'txt' in .json"),
        (
            spoil_image,
            "or these are not next to each other: 000006 has txt; or leave them out with --on-bad-image skip",
        ),
        (spoil_empty, "000004.tar: an empty shard; remove it, or leave it out with --on-bad-image skip"),
        (spoil_two, "000004.tar: sample a has images png and jpg; choose one with --image-column"),
    ],
)
def test_a_shard_that_cannot_be_used_is_one_line(spoil, told, copy):
    spoil(copy)
    message = refusal(copy / "{000000..000004}.tar")
    assert message.startswith("1 of 5 shards cannot be used; repair them, or leave them out\n")
    assert told in message and len(message.splitlines()) == 2
    assert refusal(copy / "{000000..000004}.tar") == message  # nothing of it is remembered


@pytest.mark.parametrize("spoil", [spoil_caption, spoil_image, spoil_empty])
def test_samples_that_lack_a_part_are_left_out_on_request(spoil, copy):
    spoil(copy)
    images = open_images(config(copy, on_bad_image="skip"))
    assert len(images) == (22 if spoil is spoil_empty else 24)
    assert images.notes == (["empty shards: 1"] if spoil is spoil_empty else [images.notes[0]])
    assert spoil is spoil_empty or images.notes[0].endswith("left out: 1")


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("{000004..000000}.tar", "{000004..000000} matches nothing; the smaller number goes first"),
        ("{}.tar", "{} matches nothing; write {000000..000099} or {a,b}"),
        ("{a..b}.tar", "{a..b} matches nothing"),
        ("{000000..000004.tar", "braces that are not closed"),
        ("x*.tar", "no file matches"),
        ("000000.tar.gz", "000000.tar.gz: no such file"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern, told, tars):
    assert told in refusal(tars / pattern)


def test_nowhere_to_keep_what_is_in_shards(tars, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "file"))
    assert "make room, or set SDTUNE_CACHE to a folder on another disk" in refusal(tars)


def test_addresses_that_cannot_be_read(lora, tmp_path, capsys):
    assert status(lora("https://me:secret@localhost/0.tar", tmp_path / "run")) == 2
    told = capsys.readouterr().err
    assert "dataset holds a password" in told and "secret" not in told
    assert not (tmp_path / "run").exists()
    assert "--dataset nothing://localhost/0.tar: Protocol not known" in refusal("nothing://localhost/{0,1}.tar")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"buckets": True}, "--buckets: images of a streamed dataset are not inspected before training"),
        ({"repeats": 2}, "--repeats: "),
        ({"max_train_samples": 5}, "--max-train-samples: "),
    ],
)
def test_options_that_want_to_know_every_image(fields, told, tars):
    assert told in refusal(tars, **fields)


def test_methods_and_folders_that_do_not_stream(lora, tars, pictures, tmp_path, capsys):
    word = f"textual-inversion --placeholder-token <x> --dataset {tars} --output-dir {tmp_path}/word"
    assert status(word.split()) == 2
    assert "this method reads no tar shards; unpack them" in capsys.readouterr().err
    assert status(lora(pictures, tmp_path / "run", "--streaming")) == 2
    assert "--streaming: reads .parquet or .tar files" in capsys.readouterr().err
    assert status(lora(pictures, tmp_path / "other", "--shard-cache", str(tmp_path))) == 2
    assert "--shard-cache: only for streamed datasets" in capsys.readouterr().err
    assert status(lora(tars, tmp_path / "third", "--shard-cache", str(tmp_path))) == 2
    assert "random crops differ each time" in capsys.readouterr().err
    assert status(f"ddpm --dataset {tars} --class-column cls --output-dir {tmp_path}/ddpm".split()) == 2
    assert "--class-column: images of a streamed dataset are not inspected" in capsys.readouterr().err


@pytest.mark.fault("A shard changes while the run trains", "The run ends with its name.")
def test_a_shard_that_changes_while_it_is_read(copy):
    shown = stream(copy)
    names = [shown[p].name for p in range(40)]
    pack(copy / "000003.tar", *drawn(50, 9))
    of_it = next(position for position, name in enumerate(names) if name.startswith("000003.tar"))
    with pytest.raises(UserError, match="has changed since this command read its headers"):
        pickle.loads(pickle.dumps(shown))[of_it]
    (copy / "000003.tar").unlink()
    with pytest.raises(UserError, match="could be read when training began, but not now"):
        pickle.loads(pickle.dumps(shown))[of_it]


def test_captions_in_other_members(tmp_path):
    image = png(Image.new("RGB", (64, 64), "red"))
    (tmp_path / "json").mkdir()
    row = {"long": ["one", "two"], "short": "red"}
    pack(tmp_path / "json" / "0.tar", ("a/b", {"json": json.dumps(row).encode(), "jpg": image, "cap": "ö".encode()}))
    assert stream(tmp_path / "json", caption_column="short")[0].caption == "red"
    assert stream(tmp_path / "json", caption_column="cap")[0].caption == "ö"
    assert {stream(tmp_path / "json", caption_column="long")[p].caption for p in range(20)} == {"one", "two"}
    assert stream(tmp_path / "json", caption="mine")[0].caption == "mine"
    with pytest.raises(UserError, match="the caption is missing"):
        stream(tmp_path / "json", caption_column="none")[0]
