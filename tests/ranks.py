"""Processes forked from the tests, where everything is imported already: those of a run, and launchers."""

import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from sdtune.cli import main


class Forked:
    """A function called in a process of its own; what it prints goes to ``{name}.out`` and ``{name}.err``."""

    def __init__(self, work: Callable[[], Any], name: Path, **environment: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.name = name
        name.parent.mkdir(exist_ok=True)
        self.process = get_context("fork").Process(target=self._run, args=(work, environment))
        self.process.start()

    def _run(self, work: Callable[[], Any], environment: dict[str, str]) -> None:
        os.environ |= environment
        for number, end in ((1, ".out"), (2, ".err")):
            file = os.open(self.name.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        work()

    def code(self, seconds: float = 120) -> int | None:
        """How it ended."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def said(self, end: str) -> str:
        return self.name.with_suffix(f".{end}").read_text()


class Ranks:
    """A command line on ``world`` processes, without a launcher; what each prints is in ``folder``.

    Args:
        environment: what else a launcher would have set.
    """

    def __init__(self, world: int, words: list[str], folder: Path, **environment: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(world)}
        environment["WORLD_SIZE"] = str(world)
        self.all = [
            Forked(partial(main, words), folder / str(rank), **environment, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(world)
        ]

    def codes(self) -> list[int | None]:
        return [rank.code() for rank in self.all]

    def said(self, end: str) -> str:
        return "".join(rank.said(end) for rank in self.all)


def trained(world: int, words: list[str], folder: Path, **environment: str) -> None:
    """Run a command line on ``world`` processes to its end."""
    ranks = Ranks(world, words, folder, **environment)
    assert ranks.codes() == [0] * world, ranks.said("err")


def reached(out: Path, lines: int) -> bool:
    """Whether a run has written as many lines of metrics."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= lines


def wait_until(holds: Callable[[], bool], *running: Forked) -> None:
    """Return when something holds, while processes still run."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        assert all(forked.process.is_alive() for forked in running), "it ended before it could be interrupted"
        time.sleep(0.005)
