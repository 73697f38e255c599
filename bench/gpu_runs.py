"""What the rows of bench/gpu.py are made of: processes of their own, which end when the time is up."""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # this process leaves the GPU alone, so that it can be forked

import torch

from sdtune.cli import main as main_of_sdtune
from sdtune.training import loop  # noqa: F401  so that no fork has to import it

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()
ends = float("inf")
"""When the time is up, by the monotonic clock."""


class Skipped(Exception):
    """Why a row was not run."""


def give(seconds: float) -> None:
    """The time that there is, from now on."""
    global ends
    ends = time.monotonic() + seconds


def left() -> float:
    """Seconds of the time that are left."""
    return ends - time.monotonic()


def needs_gpu() -> None:
    if not GPU:
        raise Skipped("needs a GPU")


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise Skipped(f"needs {library}")


def started(words: str, out: Path, **environment: str) -> Any:
    """A run in a fork, since imports take longer than such a run; what it prints goes to a file beside ``out``."""
    printed = out.with_suffix(".printed")

    def work() -> None:
        os.environ.update(environment)
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        main_of_sdtune([*words.split(), "--output-dir", str(out)])

    child = get_context("fork").Process(target=work)
    child.start()
    return child


def sdtune(words: str, out: Path, **environment: str) -> Path:
    """Train; a failure raises AssertionError."""
    child = started(words, out, **environment)
    child.join(left())
    if child.is_alive():
        child.kill()
        child.join()
        raise Skipped("the time was up before it ended")
    text = out.with_suffix(".printed").read_text(encoding="utf-8", errors="replace")
    assert child.exitcode == 0, f"{words}: exit code {child.exitcode}: {text[-600:]}"
    return out


def python(*words: str) -> str:
    """Run Python in a process of its own; what it printed."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, *words], cwd=HERE, start_new_session=True, **pipes)
    try:
        printed, errors = child.communicate(timeout=left())
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with the runs that it started
        child.communicate()
        raise Skipped("the time was up before it ended") from None
    assert child.returncode == 0, (printed + errors)[-800:]
    return str(printed).strip()


def digest(run: Path, name: str) -> str:
    return hashlib.sha256((run / name).read_bytes()).hexdigest()[:16]
