"""Training from shards: the order, the bytes, exact resume and the cuts of a step; what is wrong with a shard."""

import json
import shutil
import signal
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file

from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import RunFailed, UserError
from sdtune.data import ShardStream, cache, encoded_shards, files, open_images
from sdtune.data.shard_order import ShardOrder
from tests import ranks
from tests.compare import assert_same_bits, difference
from tests.conftest import status
from tests.tars import UNEQUAL, parquet, unequal
from tests.tinyhub import TinyHub

DRAWS = ["--no-center-crop", "--random-flip", "--caption-dropout", "0.2", "--noise-offset", "0.05"]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return unequal(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def copy(tars, tmp_path):
    """Those tars, to spoil."""
    return shutil.copytree(tars, tmp_path / "shards")


@pytest.fixture
def lora(sd):
    return partial(command, sd)


def command(sd, dataset, out, *options):
    """``sdtune lora`` with small settings; a step is 4 images."""
    words = f"lora --model {sd} --dataset {dataset} --output-dir {out} --resolution 32 --rank 2 --steps 4"
    words += " --num-validation-images 0 --checkpointing-steps 2 --log-steps 50 --learning-rate 1e-4"
    given = {option.partition("=")[0] for option in options}
    words += "" if "--train-batch-size" in given else " --train-batch-size 4"
    return [*words.split(), "--shuffle-window", "8", *DRAWS, *options]


def config(dataset, **fields):
    return LoraConfig(dataset=str(dataset), **{"resolution": 64, "shuffle_window": 8} | fields)


def stream(dataset, group=4, **fields):
    cfg = config(dataset, **fields)
    return ShardStream(cfg, open_images(cfg), group)


# ---- the order


@pytest.mark.parametrize(("group", "lanes", "window"), [(1, 1, 1), (4, 4, 8), (6, 4, 1000), (8, 8, 3), (40, 40, 4)])
def test_each_epoch_of_a_lane_shows_each_image_once(group, lanes, window):
    counts = np.array([*UNEQUAL, 0, 11])
    order = ShardOrder(0, counts, group, lanes, window)
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
    forward = [ShardOrder(3, np.array(UNEQUAL), 4, 4, 8)[p] for p in range(200)]
    order = ShardOrder(3, np.array(UNEQUAL), 4, 4, 8)
    assert [order[p] for p in reversed(range(200))] == forward[::-1]
    assert forward != [ShardOrder(4, np.array(UNEQUAL), 4, 4, 8)[p] for p in range(200)]
    assert [p[:2] for p in forward[:25]] != [p[:2] for p in forward[25:50]]


def test_a_hundred_million_images_and_a_process_that_reads_few_shards():
    """512 processes of 4 images: in its first 100 steps one of them touches a few of 10,000 shards."""
    counts = np.full(10_000, 10_000)
    order = ShardOrder(0, counts, 2048, 512, 1_000_000)
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


@pytest.mark.fault("A run on shards is killed, and continued with more workers", "It ends with the same bits.")
@pytest.mark.processes
def test_killed_run_continues_to_the_same_bits_with_other_workers(lora, tars, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert status(lora(tars, whole, "--dataloader-num-workers", "0", "--steps", "10")) == 0
    words = lora(tars, cut, "--dataloader-num-workers", "2", "--steps", "10")
    second = cut / "checkpoints" / "step-000004"
    code, _ = ranks.interrupt(words, tmp_path / "output", signal.SIGKILL, second.exists)
    assert code == -signal.SIGKILL
    assert status(words) == 0
    assert_same_bits(whole, cut)


@pytest.mark.processes
def test_cut_into_processes_and_accumulation(lora, tars, tmp_path):
    pattern = tars / "{000000..000004}.tar"
    assert status(lora(pattern, tmp_path / "whole", "--num-holdout-images", "8")) == 0
    cut = ["--train-batch-size", "1", "--gradient-accumulation-steps", "2"]
    words = lora(pattern, tmp_path / "cut", "--num-holdout-images", "8", *cut)
    printed = ranks.train(2, words, tmp_path / "output")
    assert "images: 17, 8 more held out, streamed" in printed
    assert "shards: 5, of 1 to 9 images; lanes: 4" in printed
    one, other = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("whole", "cut"))
    assert difference(one, other) < 1e-6
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert any("holdout_loss" in line for line in lines)


def test_pixels_from_shards(tars, tmp_path):
    """ddpm: cut otherwise, from shards that lie elsewhere, and ended by a step more than an epoch."""
    words = "ddpm --resolution 16 --block-out-channels 8 16 --attention-resolutions 8 --layers-per-block 1"
    words += " --norm-num-groups 4 --steps 6 --num-validation-images 0 --adam-epsilon 1e-3 --random-flip"
    moved = shutil.copytree(tars, tmp_path / "moved")
    for name, data, cut in (("whole", tars, "4 1 0"), ("cut", moved, "2 2 2")):
        batch, accumulation, workers = cut.split()
        own = ["--train-batch-size", batch, "--gradient-accumulation-steps", accumulation]
        own += ["--dataloader-num-workers", workers, "--dataset", str(data), "--output-dir", str(tmp_path / name)]
        assert status([*words.split(), *own]) == 0
    one, other = (load_file(tmp_path / n / "unet/diffusion_pytorch_model.safetensors") for n in ("whole", "cut"))
    assert difference(one, other) < 1e-6
    assert one["conv_in.weight"].shape[1] == 3


def test_continued_with_other_shards_is_an_error(lora, copy, tmp_path, capsys):
    words = lora(copy, tmp_path / "run", "--dataloader-num-workers", "0")
    assert status([*words, "--steps", "2"]) == 0
    (copy / "000004.tar").unlink()
    assert status(words) == 2
    assert "images or captions changed since this run began" in capsys.readouterr().err


# ---- what is kept


def test_moments_kept_by_shard(lora, tars, tmp_path, monkeypatch):
    """A build that dies goes on with the next shard; what trains on it learns what it learns without."""
    options = ["--center-crop", "--dataloader-num-workers", "0"]
    assert status(lora(tars, tmp_path / "fresh", *options)) == 0
    kept = ["--shard-cache", str(tmp_path / "kept")]
    real, built = cache.write_tensors, []

    def dies(file, tensors, way_out):
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(len(tensors["moments"]))
        real(file, tensors, way_out)

    monkeypatch.setattr(cache, "write_tensors", dies)
    assert status(lora(tars, tmp_path / "cached", *options, *kept)) != 0
    monkeypatch.setattr(cache, "write_tensors", lambda *given: (built.append(len(given[1]["moments"])), real(*given)))
    assert status(lora(tars, tmp_path / "cached", *options, *kept)) == 0
    assert built == list(UNEQUAL)  # none twice
    files = {file.name: file.read_bytes() for file in (tmp_path / "kept").rglob("*.safetensors")}
    assert len(files) == 5
    one, other = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("fresh", "cached"))
    assert difference(one, other) < 1e-5  # batches of the VAE differ

    share = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False)
    anew = lora(tars, tmp_path / "two", *options, "--shard-cache", str(tmp_path / "anew"), "--steps", "1")
    with monkeypatch.context() as patched:
        patched.setattr(encoded_shards, "PartialState", lambda: share)
        assert status(anew) == 2  # without the other process
    assert built[5:] == [UNEQUAL[1], UNEQUAL[3]]
    assert status(anew) == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "anew").rglob("*.safetensors")} == files


@pytest.mark.fault("The disk is too small for a shard cache", "Refused with the bytes needed and free.")
def test_a_shard_cache_that_does_not_fit(lora, tars, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoded_shards.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 10))
    words = lora(tars, tmp_path / "run", "--center-crop", "--shard-cache", str(tmp_path / "kept"))
    assert status(words) == 2
    assert "GiB are free; make room, or leave it out" in capsys.readouterr().err
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


# ---- far away


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A Hub on the loopback that this process asks, with the tars and the parquet files as two data sets."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    work = tmp_path_factory.mktemp("hub")
    with TinyHub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        api = HfApi(endpoint=running.url, token=running.token)
        for name, folder in (("pictures", parquet(work / "pictures")), ("shards", unequal(work / "shards"))):
            api.create_repo(f"tester/{name}", repo_type="dataset")
            api.upload_folder(folder_path=folder, repo_id=f"tester/{name}", repo_type="dataset")
        running.requests.clear()
        running.folder = work
        yield running


@pytest.mark.processes
def test_a_hub_dataset_is_trained_on_without_a_download(lora, hub, tmp_path):
    """The same bits as from the same files on disk; they are asked for in parts, and nothing is kept of them."""
    assert status(lora(hub.folder / "pictures", tmp_path / "near", "--streaming", "--steps", "4")) == 0
    known = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": hub.token}
    words = lora("tester/pictures", tmp_path / "far", "--streaming", "--steps", "4", "--dataloader-num-workers", "2")
    done = ranks.launch(words, **known)
    assert done.returncode == 0, done.stderr
    assert "shards: 6, of 4 to 4 images" in done.stdout
    one, other = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("near", "far"))
    assert difference(one, other) == 0
    asked = {(method, code) for method, path, _, code in hub.requests if path.endswith(".parquet")}
    assert asked == {("GET", 206)}
    assert not list((tmp_path / "hf").rglob("*.parquet"))


@pytest.mark.fault("A web server of shards fails", "It is asked again; then exit code 1, the last checkpoint whole.")
def test_shards_on_a_web_server(hub, tars, monkeypatch):
    """By byte range, and patient; a run that cannot read on fails through no mistake of the user."""
    waited = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    address = f"{hub.url}/datasets/tester/shards/resolve/main/{{000000..000004}}.tar"
    near, far = stream(tars), stream(address)
    hub.requests.clear()
    for position in range(30):
        here, there = near[position], far[position]
        assert here == there and near.pixels(here).equal(far.pixels(there))
    assert [code for *_, code in hub.requests] == [206] * 30  # one read for each image, caption and all
    signed = stream(f"{address}?sv=1&sig=s3cr3t")
    assert signed[0] == near[0] and "s3cr3t" not in repr(signed.images.names)
    assert signed.images.fingerprint == near.images.fingerprint
    hub.fail(r"GET .*\.tar", 503, times=2)
    assert far[30] == near[30]
    assert waited == [1, 2]
    hub.fail(r"GET .*\.tar", 503, times=9)
    with pytest.raises(RunFailed, match="tar cannot be read: the server answers 503; the last checkpoint is complete"):
        far[31]
    hub.faults.clear()
    with pytest.raises(UserError, match=r"000005\.tar: no such file"):
        stream(address.replace("000004", "000005"))
