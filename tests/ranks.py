"""Processes of a run without a launcher: forked from the tests, where everything is imported already."""

import os
import socket
import sys
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from sdtune.cli import main


class Ranks:
    """A command line on ``world`` processes; what each prints is in ``folder``.

    Args:
        environment: what else a launcher would have set.
    """

    def __init__(self, world: int, words: list[str], folder: Path, **environment: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.world, self.folder = world, folder
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
        start = get_context("fork").Process
        self.processes = [start(target=self._run, args=(rank, words, environment | place)) for rank in range(world)]
        for process in self.processes:
            process.start()

    def _run(self, rank: int, words: list[str], environment: dict[str, str]) -> None:
        os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.world)}
        for name in ("out", "err"):
            file = os.open(self.folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, {"out": 1, "err": 2}[name])
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        main(words)

    def codes(self) -> list[int | None]:
        """How each of them ended."""
        for process in self.processes:
            process.join(120)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def said(self, name: str) -> str:
        return "".join((self.folder / f"{rank}.{name}").read_text() for rank in range(self.world))


def trained(world: int, words: list[str], folder: Path, **environment: str) -> None:
    """Run a command line on ``world`` processes to its end."""
    ranks = Ranks(world, words, folder, **environment)
    assert ranks.codes() == [0] * world, ranks.said("err")
