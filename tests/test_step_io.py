"""What a run reads: nothing in a step, and no frozen weights when its cache is full."""

import sys
from pathlib import Path

from huggingface_hub import HfApi, constants

from sdtune.data import cache
from sdtune.models.families import parts
from sdtune.recipes.lora import Lora
from tests import contract
from tests.conftest import command, status

QUIET = ("--num-validation-images", "0", "--validation-steps", "0", "--checkpointing-steps", "0", "--log-steps", "99")


def test_a_step_asks_no_hub_and_opens_no_file(here, sd, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "CHUNK", 1)  # a file for each image, so that each step reads from another one
    api = HfApi(endpoint=here.url, token=here.token)
    api.create_repo("tester/base")
    api.upload_folder(folder_path=sd, repo_id="tester/base")
    steps, opened, asked, mapped = [], [], [], []

    def after_step(recipe):
        steps.append(len(steps) + 1)
        asked.append(len(here.requests))
        maps = Path("/proc/self/maps")  # what Rust opens is no event of Python's
        words = maps.read_text().split() if maps.exists() else []
        mapped.append({word for word in words if word.startswith(str(tmp_path / "cache"))})

    def notice(event, args):
        if event == "open" and len(steps) in (2, 3, 4):
            opened.append(args[0])

    sys.addaudithook(notice)
    monkeypatch.setattr(Lora, "after_step", after_step)
    words = command("tester/base", pictures, tmp_path / "run", "--cache-dir", str(tmp_path / "hub"), *QUIET)
    assert status([*words, "--steps", "5"]) == 0
    assert len(set(asked[1:])) == 1
    assert [path for path in opened if not str(path).startswith("/proc")] == []
    assert all(each == mapped[0] for each in mapped)
    # The export reads the parts again, and asks nobody: all has been downloaded
    assert here.requests[asked[-1] :] == []
    # A run that is continued encodes nothing, so its preview is the first to read the VAE and the text encoder
    monkeypatch.setattr(Lora, "after_step", lambda recipe: here.fail("", 429, times=99))
    begun = len(here.requests)
    assert status([*words, "--steps", "6", "--num-validation-images", "1", "--validation-inference-steps", "1"]) == 0
    assert [request for request in here.requests[begun:] if request[-1] == 429] == []
    assert list((tmp_path / "run" / "samples").glob("*6*.png"))


def test_a_run_whose_cache_is_full_reads_no_frozen_weights(places, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(parts, "read_part", lambda kind, *a, **k: read.append(kind) or original(kind, *a, **k))
    weights = contract.RECIPES["lora"].weights
    for name in ("cold", "warm"):
        read.clear()
        assert status(contract.command("lora", places, tmp_path / name, *QUIET, "--steps", "2")) == 0
    assert [k.__name__ for k in read if getattr(k, "__name__", "") in ("AutoencoderKL", "CLIPTextModel")] == []
    assert (tmp_path / "cold" / weights).read_bytes() == (tmp_path / "warm" / weights).read_bytes()


original = parts.read_part
