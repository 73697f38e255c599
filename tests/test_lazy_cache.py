"""--lazy-cache: images are encoded when they are first shown, and nothing else changes."""

import pytest
import torch
from safetensors.torch import load_file

from sdtune.data import cache
from sdtune.data.lazy_store import LazyStore
from tests import ranks
from tests.conftest import status
from tests.contract import command

KEYS = [f"key-{k:03d}" for k in range(150)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Makes a store of KEYS; also what it has computed, and how often it was complete."""
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path))

    def make(keys=KEYS):
        computed, complete = [], []

        def compute(key):
            computed.append(key)
            return torch.full((4,), float(key[-3:]))

        return LazyStore("moments", "source", keys, compute, lambda: complete.append(True)), computed, complete

    return make


def test_a_tensor_is_computed_when_it_is_read_and_once(store):
    lazy, computed, complete = store()
    assert computed == [] and set(lazy) == set(KEYS) and len(lazy) == len(KEYS)
    for key in KEYS[:100] * 2:
        assert torch.equal(lazy[key], torch.full((4,), float(key[-3:])))
    assert computed == KEYS[:100] and complete == []
    again, computed, complete = store()  # as after a kill: what was not written is computed again
    for key in KEYS * 2:
        assert torch.equal(again[key], torch.full((4,), float(key[-3:])))
    assert computed == KEYS[cache.CHUNK :] and complete == [True]
    full, computed, complete = store()
    assert [float(full[key][0]) for key in KEYS] == [float(k) for k in range(len(KEYS))]
    assert (computed, complete) == ([], [True])


def test_what_another_process_has_stored_is_not_computed_again(store):
    (one, ours, _), (other, theirs, complete) = store(), store()
    for key in KEYS[:64]:
        one[key]
    for key in KEYS:
        other[key]
    assert (ours, theirs, complete) == (KEYS[:64], KEYS[64:], [True])
    assert torch.equal(one[KEYS[100]], other[KEYS[100]]) and ours == KEYS[:64]


@pytest.mark.processes
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_encodes_while_it_trains_is_the_run_that_encoded_before(places, tmp_path, monkeypatch, world):
    """The adapter is the same, and so is what one process has stored after an epoch."""
    stored = {}
    for name, more in {"before": [], "while": ["--lazy-cache"]}.items():
        monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / f"cache-{name}"))
        each = str(2 // world)
        words = command("lora", places, tmp_path / name, *more, "--steps", "8", "--train-batch-size", each)
        if world == 1:
            assert status(words) == 0
        else:
            ranks.train(world, words, tmp_path / f"output-{name}")
        files = (tmp_path / f"cache-{name}" / "moments").rglob("*.safetensors")
        stored[name] = {key: x.tolist() for file in files for key, x in load_file(file).items()}
    assert world == 2 or stored["while"] == stored["before"] != {}
    one, other = ((tmp_path / n / "pytorch_lora_weights.safetensors").read_bytes() for n in ("before", "while"))
    assert one == other


def test_nothing_is_encoded_before_the_first_step(lora, monkeypatch, tmp_path):
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    lora("run", "--lazy-cache", "--steps", "1", "--train-batch-size", "1", "--num-validation-images", "0")
    assert list((tmp_path / "cache" / "moments").rglob("*.safetensors")) == []  # one image of many, not yet a file


def test_workers_cannot_encode(places, tmp_path, capsys):
    words = ["--lazy-cache", "--dataloader-num-workers", "1"]
    assert status(command("lora", places, tmp_path / "run", *words)) == 2
    assert "lazy_cache encodes in the training process" in capsys.readouterr().err
