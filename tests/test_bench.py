"""The benchmarks can be started; what they measure is in docs/log.md."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def alone(monkeypatch):
    """Benchmarks import one another by names without a package, which no other test may find."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCH)
    yield
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


def test_every_benchmark_finds_what_it_needs(alone):
    for file in sorted(BENCH.glob("*.py")):
        importlib.import_module(file.stem)
