"""The short form of ``bench/soak.py``: one run that meets every fault once."""

from pathlib import Path

import pytest

from bench import soak


@pytest.mark.fault(
    "Kills inside a save, a rename and a prune, stops, a full disk, damaged checkpoints, one after the other",
    "The run ends with the bytes of one that met none.",
)
@pytest.mark.processes
def test_a_run_that_meets_every_fault_ends_as_one_that_meets_none(tmp_path: Path):
    counts = soak.soak(0, seed=1, folder=tmp_path, names=["ddpm"])
    assert not [key for key in counts if key.startswith("WRONG")], counts
    assert counts["runs equal to the uninterrupted one"] == 1
    assert sum(counts[fault] for fault in (*soak.FAULTS, *soak.DAMAGES)) >= 8
