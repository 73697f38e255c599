"""The cache: computed once, kept whole, shared, and never another model's."""

import os
import pickle

import pytest
import torch

from sdtune.config.sections import RunFailed, UserError
from sdtune.data import cache
from sdtune.run import files

KEYS = [f"key-{k:03d}" for k in range(150)]


def tensor_of(key):
    return torch.full((4,), float(key[-3:]))


def counting(counted):
    def compute(key):
        counted.append(key)
        return tensor_of(key)

    return compute


def test_each_tensor_is_computed_once(tmp_path):
    counted = []
    store = cache.fill(tmp_path, KEYS, counting(counted), "")
    assert sorted(counted) == KEYS
    assert all(torch.equal(store[key], tensor_of(key)) for key in KEYS)
    cache.fill(tmp_path, [*KEYS, "key-900"], counting(counted), "")
    assert counted[150:] == ["key-900"]


def test_a_full_store_is_opened_once(tmp_path, monkeypatch):
    cache.fill(tmp_path, KEYS, tensor_of, "")
    opened, real = [], cache.safe_open
    monkeypatch.setattr(cache, "safe_open", lambda file, **how: (opened.append(file), real(file, **how))[1])
    store = cache.fill(tmp_path, KEYS, tensor_of, "")
    assert len(opened) == 3
    assert sorted(store) == KEYS


def test_run_that_dies_half_way_keeps_what_it_finished(tmp_path):
    def dies(key):
        if key == KEYS[100]:
            raise KeyboardInterrupt
        return tensor_of(key)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(tmp_path, KEYS, dies, "")
    counted = []
    store = cache.fill(tmp_path, KEYS, counting(counted), "")
    assert len(counted) == len(KEYS) - cache.CHUNK
    assert all(torch.equal(store[key], tensor_of(key)) for key in KEYS)


def test_two_runs_may_fill_one_store_at_once(tmp_path):
    """The second run starts and ends while the first one is in the middle."""
    other = []

    def interrupted(key):
        if key == KEYS[70]:
            cache.fill(tmp_path, KEYS, counting(other), "")
        return tensor_of(key)

    store = cache.fill(tmp_path, KEYS, interrupted, "")
    assert other
    assert sorted(store) == KEYS
    assert all(torch.equal(store[key], tensor_of(key)) for key in KEYS)
    assert not list(tmp_path.glob("*.tmp"))


def test_damaged_file_is_computed_again(tmp_path):
    cache.fill(tmp_path, KEYS, tensor_of, "")
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])
    counted = []
    store = cache.fill(tmp_path, KEYS, counting(counted), "")
    assert 0 < len(counted) <= cache.CHUNK
    assert all(torch.equal(store[key], tensor_of(key)) for key in KEYS)


def test_store_travels_to_a_worker_without_its_open_files(tmp_path):
    store = cache.fill(tmp_path, KEYS[:3], tensor_of, "")
    assert torch.equal(store[KEYS[1]], tensor_of(KEYS[1]))
    assert torch.equal(pickle.loads(pickle.dumps(store))[KEYS[1]], tensor_of(KEYS[1]))


def test_key_of_a_model_is_its_content():
    torch.manual_seed(0)
    one, same = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    same.load_state_dict(one.state_dict())
    assert cache.weights_digest(one) == cache.weights_digest(same)
    with torch.no_grad():
        same.weight[2, 2] += 1e-7
    assert cache.weights_digest(one) != cache.weights_digest(same)
    assert cache.weights_digest(one) != cache.weights_digest(one.to(torch.bfloat16))


def test_second_run_computes_nothing_and_gives_the_same_bytes(lora, monkeypatch, tmp_path):
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    one = lora("one", "--random-flip", "--steps", "2")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(files) == 2  # moments, with and without flip, and texts
    other = lora("other", "--random-flip", "--steps", "2")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")} == files
    name = "pytorch_lora_weights.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_what_cannot_be_cached_is_said(lora, capsys):
    lora("run", "--no-center-crop", "--shuffle-tags", "--caption", "red, circle, small", "--steps", "1")
    said = capsys.readouterr().out
    assert "VAE moments are not cached: random crops" in said
    assert "text embeddings are not cached: " in said


def test_another_vae_is_used_and_has_a_cache_of_its_own(lora, sd, tmp_path, capsys):
    """``--vae`` with the base's own VAE changes nothing, with another one everything."""
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(sd / "vae")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    name = "pytorch_lora_weights.safetensors"
    plain, own, changed = (
        (lora(run, *options, "--steps", "2") / name).read_bytes()
        for run, options in {
            "plain": [],
            "own": ["--vae", str(sd / "vae")],
            "other": ["--vae", str(tmp_path / "other")],
        }.items()
    )
    assert len({plain[-4000:], own[-4000:]}) == 1
    assert plain[-4000:] != changed[-4000:]
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        lora("bad", "--vae", str(tmp_path / "nothing"))
    assert "--vae" in capsys.readouterr().err


@pytest.mark.fault("A bit of the cache flips", "It is found by its checksum and computed again.")
def test_a_flipped_bit_is_found_and_computed_again(tmp_path):
    store = cache.fill(tmp_path, KEYS[:3], tensor_of, "")
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-7] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(RunFailed, match=r"damaged on the disk .*give the same command again"):
        [store[key] for key in KEYS[:3]]
    counted = []
    store = cache.fill(tmp_path, KEYS[:3], counting(counted), "")
    assert sorted(counted) == KEYS[:3]
    assert all(torch.equal(store[key], tensor_of(key)) for key in KEYS[:3])


def test_files_obey_the_umask_and_those_of_killed_runs_are_swept(tmp_path):
    key = "0123456789abcdef01234567"
    for name in (f"{key}.77.tmp", f".{key}-77.tmp", ".tmpAb12Cd", "tmpabcd_123.tmp"):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (0, 0))
    for name in ("0123456789abcdef01234568.78.tmp", "mine.tmp"):  # being written now; of the user
        (tmp_path / name).write_bytes(b"half")
    old = os.umask(0o002)
    try:
        cache.fill(tmp_path, KEYS[:3], tensor_of, "")
    finally:
        os.umask(old)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o664
    assert sorted(p.name for p in tmp_path.glob("*tmp*")) == ["0123456789abcdef01234568.78.tmp", "mine.tmp"]


def test_folders_that_killed_runs_left_half_filled_are_swept(tmp_path):
    for name in (".model-77", ".model-78", ".model-mine", ".model-two-77"):
        (tmp_path / name).mkdir()
        if name != ".model-78":  # which is being filled now
            os.utime(tmp_path / name, (0, 0))
    files.sweep_folders(tmp_path / ".model-79")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model-78", ".model-mine", ".model-two-77"]


@pytest.mark.fault("The cache cannot be written", "Refused in one line, with the way out.")
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"the cache cannot be written .*SDTUNE_CACHE"):
        cache.fill(tmp_path / "file" / "moments", KEYS, tensor_of, "")


@pytest.mark.fault("A file in a shared cache cannot be read", "It is computed again.")
def test_a_file_of_another_user_that_cannot_be_read_is_computed_again(tmp_path, monkeypatch):
    cache.fill(tmp_path, KEYS[:3], tensor_of, "")
    real = cache.safe_open

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "safe_open", forbidden)
    assert len(cache.Store(tmp_path)) == 0
    monkeypatch.setattr(cache, "safe_open", real)
    assert len(cache.Store(tmp_path)) == 3


@pytest.mark.parametrize(("masked", "longest", "looked_at"), [(False, 0, 1), (True, 149, len(KEYS))])
def test_lengths_without_values_are_looked_for_once_where_there_are_none(masked, longest, looked_at):
    """To trace a text encoder for each of many captions would take `sdtune check` minutes."""
    counted = []

    def compute(key):
        counted.append(key)
        return {"embeds": torch.empty(3, 2, device="meta")} | ({"mask": torch.empty(int(key[-3:]))} if masked else {})

    assert cache.MetaStore(KEYS, compute).longest(KEYS, "mask") == longest
    assert len(counted) == looked_at
