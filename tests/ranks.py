"""Processes forked from the tests, where everything is imported already: the ranks of a run, launchers, victims.

A fresh Python spends five seconds on imports; a fork spends none. What has to be a real process is started with
`launch`.
"""

import fcntl
import gc
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from accelerate.state import AcceleratorState

import sdtune
from sdtune.cli import main


@cache
def import_everything() -> None:
    """So that no fork has to: what is imported when it is first needed would be imported in each of them."""
    for module in pkgutil.walk_packages(sdtune.__path__, "sdtune."):
        if module.name != "sdtune.__main__":
            import_module(module.name)
    gc.freeze()


class Forked:
    """A function called in a process of its own; what it prints goes to ``{name}.out`` and ``{name}.err``.

    Args:
        python: what a launcher in it starts in place of a fresh Python, see `quick_sdtune`.
    """

    def __init__(self, work: Callable[[], Any], name: Path, python: Path | None = None, **environment: str):
        import_everything()
        AcceleratorState._reset_state(reset_partial_state=True)
        self.name = name
        name.parent.mkdir(exist_ok=True)
        self.process = get_context("fork").Process(target=self._run, args=(work, python, environment))
        self.process.start()

    def _run(self, work: Callable[[], Any], python: Path | None, environment: dict[str, str]) -> None:
        os.environ |= environment
        sys.executable = str(python or sys.executable)
        for number, end in ((1, ".out"), (2, ".err")):
            file = os.open(self.name.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        work()

    def exit_code(self, seconds: float = 300) -> int | None:
        """How it ended; a negative number is the signal that killed it."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def output(self, end: str) -> str:
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

    def exit_codes(self) -> list[int | None]:
        return [rank.exit_code() for rank in self.all]

    def output(self, end: str) -> str:
        return "".join(rank.output(end) for rank in self.all)


def train(world: int, words: list[str], folder: Path, **environment: str) -> str:
    """Run a command line on ``world`` processes to its end; what they printed. One needs no launcher."""
    if world == 1:
        alone = Forked(partial(main, words), folder / "0", **environment)
        assert alone.exit_code() == 0, alone.output("err")
        return alone.output("out")
    ranks = Ranks(world, words, folder, **environment)
    assert ranks.exit_codes() == [0] * world, ranks.output("err")
    return ranks.output("out")


def launch(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Run a command line as a user does: a fresh Python, and its own launcher where it asks for processes."""
    line = [sys.executable, "-m", "sdtune", *words]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True)


def interrupt(
    words: list[str], folder: Path, number: signal.Signals, when: Callable[[], bool], python: Path | None = None
) -> tuple[int, str]:
    """Run a command line in a fork that sends itself a signal once ``when()`` holds; exit code and output.

    A thread of the victim looks, so that a busy machine slows both alike.
    """

    def watched() -> None:
        Thread(target=watch, daemon=True).start()
        main(words)

    def watch() -> None:
        while not when():
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    victim = Forked(watched, folder / "victim", python)
    code = victim.exit_code()
    assert code, f"it ended before it could be interrupted: {victim.output('err')}"
    return code, victim.output("out")


def launch_and_interrupt(words: list[str], number: signal.Signals, when: Callable[[], bool]) -> tuple[int, str]:
    """As `interrupt`, with a real process that gets its signal from outside."""
    child = subprocess.Popen([sys.executable, "-m", "sdtune", *words], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not when() and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert child.poll() is None, "it ended before it could be interrupted"
    child.send_signal(number)
    printed, _ = child.communicate(timeout=60)
    return child.returncode, printed


def reached(out: Path, lines: int) -> bool:
    """Whether a run has written as many lines of metrics."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= lines


def wait_until(holds: Callable[[], bool], *running: Forked) -> None:
    """Return when something holds, while processes still run."""
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        assert all(forked.process.is_alive() for forked in running), "it ended before it could be interrupted"
        time.sleep(0.005)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
