"""What glibc is told about malloc, and when it is told nothing."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sdtune.run.allocator import tune_malloc


@pytest.fixture
def told(monkeypatch):
    """What `mallopt` was called with, on a Linux whose environment says nothing of malloc."""
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # so that it is put back
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    return calls


def test_large_tensors_have_pages_of_their_own_and_small_ones_stay(told):
    tune_malloc()
    assert told == [(-3, 4 << 20), (-1, 512 << 20)]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_what_the_environment_says_stays(told, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    tune_malloc()
    assert told == []
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_another_c_library_is_told_nothing(platform, told, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "linux":
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    tune_malloc()
    assert told == []


@pytest.mark.processes
def test_torch_is_not_there_yet_when_a_run_asks_for_pages(tmp_path):
    """It reads what it is told once, with its first tensor, and its libraries make some when they are imported."""
    program = """
import sys
from sdtune import cli

def noted():
    print("torch" in sys.modules)
    sys.exit()

cli.tune_malloc = noted
cli.main(sys.argv[1:])
"""
    words = ["lora", "--dataset", "tiny-hearts", "--model", "tiny", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
