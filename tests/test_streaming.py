"""Training from shards: the order, the bytes, exact resume and the cuts of a step; what is wrong with a shard."""

import gc
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdtune import cache, encoded, shapes
from sdtune.configs import RunFailed, UserError
from sdtune.data import Streamed, open_images, shards
from sdtune.data.lanes import Lanes
from sdtune.methods import LoraConfig
from tests.conftest import status
from tests.test_cuts import difference
from tests.test_resume import assert_same_bits, start_then_kill

UNEQUAL = (7, 1, 5, 9, 3)
"""Images of each shard."""
DRAWS = ["--no-center-crop", "--random-flip", "--caption-dropout", "0.2", "--noise-offset", "0.05"]


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
        scene = shapes.random_scene(draws)
        text = shapes.random_caption(scene, draws)
        yield f"{number:06}", {"png": png(shapes.render(scene, 64, 72)), "txt": text.encode()}


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Twenty-five captioned pictures in five tars of unequal length."""
    folder, first = tmp_path_factory.mktemp("data") / "shards", 0
    folder.mkdir()
    for shard, count in enumerate(UNEQUAL):
        pack(folder / f"{shard:06}.tar", *drawn(first, count))
        first += count
    return folder


@pytest.fixture
def copy(tars, tmp_path):
    """Those tars, to spoil."""
    return shutil.copytree(tars, tmp_path / "shards")


def lora(dataset, out, *options):
    """``sdtune lora`` on the built-in base; a step is 4 images."""
    words = f"lora --model tiny --dataset {dataset} --output-dir {out} --resolution 64 --rank 2 --steps 8"
    words += " --num-validation-images 0 --checkpointing-steps 2 --log-steps 50 --learning-rate 1e-4"
    given = {option.partition("=")[0] for option in options}
    words += "" if "--train-batch-size" in given else " --train-batch-size 4"
    return [*words.split(), "--shuffle-window", "8", *DRAWS, *options]


def config(dataset, **fields):
    return LoraConfig(dataset=str(dataset), **{"resolution": 64, "shuffle_window": 8} | fields)


def stream(dataset, group=4, **fields):
    cfg = config(dataset, **fields)
    return Streamed(cfg, open_images(cfg), group)


# ---- the order


@pytest.mark.parametrize(("group", "lanes", "window"), [(1, 1, 1), (4, 4, 8), (6, 4, 1000), (8, 8, 3), (40, 40, 4)])
def test_each_epoch_of_a_lane_shows_each_image_once(group, lanes, window):
    counts = np.array([*UNEQUAL, 0, 11])
    order = Lanes(0, counts, group, lanes, window)
    seen = [Counter() for _ in range(3)]
    for lane in range(order.lanes):
        share, own = group // order.lanes, (lane + 1) * 36 // order.lanes - lane * 36 // order.lanes
        turns = [s * group + lane * share + k for s in range(3 * 36) for k in range(share)]
        for turn, position in enumerate(turns[: 3 * own]):
            place = order[position]
            assert place.lane == lane and place.shard in place.live
            seen[turn // own][place.shard, place.nth] += 1
    everything = Counter((shard, nth) for shard, count in enumerate(counts) for nth in range(count))
    assert seen == [everything] * 3


def test_a_position_shows_the_same_in_whatever_order_it_is_asked_for():
    forward = [Lanes(3, np.array(UNEQUAL), 4, 4, 8)[p] for p in range(200)]
    order = Lanes(3, np.array(UNEQUAL), 4, 4, 8)
    assert [order[p] for p in reversed(range(200))] == forward[::-1]
    assert forward != [Lanes(4, np.array(UNEQUAL), 4, 4, 8)[p] for p in range(200)]
    assert [p[:2] for p in forward[:25]] != [p[:2] for p in forward[25:50]]


def test_a_hundred_million_images_and_a_process_that_reads_few_shards():
    """512 processes of 4 images: in its first 100 steps one of them touches a few of 10,000 shards."""
    counts = np.full(10_000, 10_000)
    order = Lanes(0, counts, 2048, 512, 1_000_000)
    mine = [order[step * 2048 + 7 * 4 + k] for step in range(100) for k in range(4)]
    others = [order[step * 2048 + 8 * 4 + k] for step in range(100) for k in range(4)]
    assert len({p.shard for p in mine}) <= 2 and len({(p.shard, p.nth) for p in mine}) == 400
    assert not {(p.shard, p.nth) for p in mine} & {(p.shard, p.nth) for p in others}
    held = sum(a.nbytes for arrays in order._epochs.values() for a in arrays) + order.counts.nbytes
    assert held + sum(window.order.nbytes for window in order._windows.values()) < 1e6  # bytes


def test_what_is_kept_of_an_image_is_32_bytes(tars):
    images = open_images(config(tars))
    assert [np.load(file, mmap_mode="r").nbytes for file in images.files] == [32 * count for count in UNEQUAL]


# ---- training


def test_killed_run_continues_to_the_same_bits_with_other_workers(tars, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert status(lora(tars, whole, "--dataloader-num-workers", "0", "--steps", "16")) == 0
    words = lora(tars, cut, "--dataloader-num-workers", "2", "--steps", "16")
    code, _ = start_then_kill(words, cut, signal.SIGKILL, (cut / "checkpoints" / "step-000006").exists)
    assert code == -signal.SIGKILL
    assert status(words) == 0
    assert_same_bits(whole, cut)


def test_cut_into_processes_and_accumulation(tars, tmp_path):
    pattern = tars / "{000000..000004}.tar"
    assert status(lora(pattern, tmp_path / "whole", "--num-holdout-images", "8")) == 0
    cut = ["--num-processes", "2", "--train-batch-size", "1", "--gradient-accumulation-steps", "2"]
    words = lora(pattern, tmp_path / "cut", "--num-holdout-images", "8", *cut)
    done = subprocess.run([sys.executable, "-m", "sdtune", *words], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "images: 17, 8 more held out, streamed" in done.stdout
    assert "shards: 5, of 1 to 9 images; lanes: 4" in done.stdout
    one, other = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("whole", "cut"))
    assert difference(one, other) < 1e-6
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert any("holdout_loss" in line for line in lines)


def test_pixels_from_shards(tars, tmp_path):
    """ddpm: cut otherwise, from shards that lie elsewhere, and ended by a step more than an epoch."""
    words = "ddpm --resolution 16 --block-out-channels 8 16 --attention-resolutions 8 --layers-per-block 1"
    words += " --norm-num-groups 4 --steps 8 --num-validation-images 0 --adam-epsilon 1e-3 --random-flip"
    moved = shutil.copytree(tars, tmp_path / "moved")
    for name, data, cut in (("whole", tars, "4 1 0"), ("cut", moved, "2 2 2")):
        batch, accumulation, workers = cut.split()
        own = ["--train-batch-size", batch, "--gradient-accumulation-steps", accumulation]
        own += ["--dataloader-num-workers", workers, "--dataset", str(data), "--output-dir", str(tmp_path / name)]
        assert status([*words.split(), *own]) == 0
    one, other = (load_file(tmp_path / n / "unet/diffusion_pytorch_model.safetensors") for n in ("whole", "cut"))
    assert difference(one, other) < 1e-6
    assert one["conv_in.weight"].shape[1] == 3


def test_continued_with_other_shards_is_an_error(copy, tmp_path, capsys):
    words = lora(copy, tmp_path / "run", "--dataloader-num-workers", "0")
    assert status([*words, "--steps", "2"]) == 0
    (copy / "000004.tar").unlink()
    assert status(words) == 2
    assert "images or captions changed since this run began" in capsys.readouterr().err


# ---- what is kept


def test_moments_kept_by_shard(tars, tmp_path, monkeypatch):
    """A build that dies goes on with the next shard; what trains on it learns what it learns without."""
    options = ["--center-crop", "--dataloader-num-workers", "0"]
    assert status(lora(tars, tmp_path / "fresh", *options)) == 0
    kept = ["--shard-cache", str(tmp_path / "kept")]
    real, built = cache.write, []

    def dies(file, tensors, way_out):
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(len(tensors["moments"]))
        real(file, tensors, way_out)

    monkeypatch.setattr(cache, "write", dies)
    assert status(lora(tars, tmp_path / "cached", *options, *kept)) != 0
    monkeypatch.setattr(cache, "write", lambda *given: (built.append(len(given[1]["moments"])), real(*given)))
    assert status(lora(tars, tmp_path / "cached", *options, *kept)) == 0
    assert built == list(UNEQUAL)  # none twice
    files = {file.name: file.read_bytes() for file in (tmp_path / "kept").rglob("*.safetensors")}
    assert len(files) == 5
    one, other = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("fresh", "cached"))
    assert difference(one, other) < 1e-5  # batches of the VAE differ

    monkeypatch.setattr(cache, "write", real)
    anew = ["--shard-cache", str(tmp_path / "anew"), "--num-processes", "2", "--train-batch-size", "2", "--steps", "1"]
    words = lora(tars, tmp_path / "two", *options, *anew)
    done = subprocess.run([sys.executable, "-m", "sdtune", *words], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "anew").rglob("*.safetensors")} == files


def test_a_shard_cache_that_does_not_fit(tars, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoded.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 10))
    words = lora(tars, tmp_path / "run", "--center-crop", "--shard-cache", str(tmp_path / "kept"))
    assert status(words) == 2
    assert "GiB are free; make room, or leave it out" in capsys.readouterr().err
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


# ---- bad images


def test_a_bad_image_is_told_when_it_is_met(copy, tmp_path, capsys):
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


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_gone, "000003.tar: no such file"),
        (spoil_cut, "000001.tar: damaged or cut short at byte 1536; copy it again"),
        (spoil_header, "000003.tar: damaged or cut short at byte"),
        (spoil_end, "000003.tar: damaged or cut short at byte"),
        (spoil_no_tar, "000000.tar: not a whole tar file"),
        (spoil_caption, "000000.tar: 1 of 7 samples are without an image and a caption (.txt, or 'txt' in .json"),
        (spoil_image, "or not beside it: 000006 has txt; or leave them out with --on-bad-image skip"),
        (spoil_empty, "000004.tar: an empty shard; remove it, or pass over it with --on-bad-image skip"),
        (spoil_two, "000004.tar: sample a has images png and jpg; say with --image-column which to train on"),
    ],
)
def test_a_shard_that_cannot_be_used_is_one_line(spoil, told, copy):
    spoil(copy)
    message = refusal(copy / "{000000..000004}.tar")
    assert message.startswith("1 of 5 shards cannot be used; mend them, or leave them out\n")
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


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"buckets": True}, "--buckets: what is streamed is not looked at image by image before training"),
        ({"repeats": 2}, "--repeats: "),
        ({"max_train_samples": 5}, "--max-train-samples: "),
    ],
)
def test_options_that_want_to_know_every_image(fields, told, tars):
    assert told in refusal(tars, **fields)


def test_methods_and_folders_that_do_not_stream(tars, pictures, tmp_path, capsys):
    word = f"textual-inversion --placeholder-token <x> --dataset {tars} --output-dir {tmp_path}/word"
    assert status(word.split()) == 2
    assert "tar shards are for lora, text-to-image and ddpm; unpack them" in capsys.readouterr().err
    assert status(lora(pictures, tmp_path / "run", "--streaming")) == 2
    assert "--streaming: reads .parquet or .tar files" in capsys.readouterr().err
    assert status(lora(pictures, tmp_path / "other", "--shard-cache", str(tmp_path))) == 2
    assert "--shard-cache: is for data sets that are streamed" in capsys.readouterr().err
    assert status(lora(tars, tmp_path / "third", "--shard-cache", str(tmp_path))) == 2
    assert "random crops differ each time" in capsys.readouterr().err
    assert status(f"ddpm --dataset {tars} --class-column cls --output-dir {tmp_path}/ddpm".split()) == 2
    assert "--class-column: what is streamed" in capsys.readouterr().err


def test_a_shard_that_changes_while_it_is_read(copy):
    shown = stream(copy)
    names = [shown[p].name for p in range(40)]
    pack(copy / "000003.tar", *drawn(50, 9))
    anew = pickle.loads(pickle.dumps(shown))
    with pytest.raises(UserError, match="changed since this command looked into it"):
        for position in range(len(names)):
            anew[position]
    (copy / "000003.tar").unlink()
    with pytest.raises(UserError, match="was there when training began, but not now"):
        for position in range(len(names)):
            pickle.loads(pickle.dumps(shown))[position]


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
