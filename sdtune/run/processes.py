"""The processes of a run end together: when one is gone, the others know within a second, and say whose fault it was.

A launcher tells the others by a signal, which a process that waits in a collective does not hear. So each keeps an
open connection to the first process, and the first to each: it breaks when its other end is gone, for whatever reason.
"""

import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import distributed

from sdtune.config.parsing import same_command
from sdtune.config.sections import Run, RunFailed, UserError
from sdtune.run import checkpoints

RESUME_COMMAND = "SDTUNE_RESUME_COMMAND"
"""Environment variable with the command that continues a run which `sdtune` has launched on many processes."""
EXIT_PEER_DIED = 75
"""Exit code of a process that ends because another did."""
BYE = b"."
"""What a process says that has nothing to do with the others any more."""
GRACE = 2.0
"""Seconds for which an error may still turn out to be another's."""
POLL = 0.05
"""Seconds between two looks at whether all have come."""


def store_barrier() -> None:
    """Wait until all processes are here, as long as one of them may be at work alone: it writes, encodes, draws.

    A collective would give up after `--ddp-timeout`, and the run with it. This asks the store instead. That a process
    is gone is for the thread to notice which watches it (see `ProcessGroupWatch`).
    """
    if not distributed.is_initialized():
        return
    world, store = distributed.get_world_size(), distributed.distributed_c10d._get_default_store()
    meeting = math.ceil(store.add("sdtune/met", 1) / world)  # none comes to the next before all were at this one
    wait_for(store, "sdtune/met", meeting * world)
    store.add("sdtune/left", 1)
    if distributed.get_rank() == 0:  # the store may be its own, and would end with it
        wait_for(store, "sdtune/left", meeting * world)


def wait_for(store: distributed.Store, key: str, count: int) -> None:
    while store.add(key, 0) < count:
        time.sleep(POLL)


def resume_command(cfg: Run, words: list[str]) -> str:
    """The command line that continues a run."""
    command = os.environ.get(RESUME_COMMAND) or same_command(cfg, ["sdtune", *words])
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and RESUME_COMMAND not in os.environ
    return f"{command}, under the same launcher" if launched else command


def describe_checkpoint(out: Path) -> str:
    """What there is to continue a run from, in words."""
    found = checkpoints.found(out / "checkpoints")  # each gets its name when it is whole
    return f"the last checkpoint, {found[-1].name}, is whole" if found else "there is no checkpoint yet"


class ProcessGroupWatch:
    """A stretch of the run at whose first error all its processes end.

    The error of the process that failed is told once. One that was killed cannot tell; then another names it. Between
    them the processes see to it that what follows from the failure is not told as well.

    Args:
        rank, world: this process, and how many there are; the process group is there already.
        out: the run's folder.
        continuing: the command that continues the run.
        patience: seconds after which a collective gives up, to be told when it does.
    """

    def __init__(self, rank: int, world: int, out: Path, continuing: str, patience: int):
        self.rank, self.world, self.out, self.continuing, self.patience = rank, world, out, continuing, patience
        self.over, self.lost = False, threading.Event()

    def __enter__(self) -> "ProcessGroupWatch":
        if self.world > 1:
            self.store: Any = distributed.distributed_c10d._get_default_store()
            self.others = dict(self._answered() if self.rank == 0 else self._called())
            for other, connection in self.others.items():
                os.register_at_fork(after_in_child=connection.close)  # readers of images may outlive their process
                threading.Thread(target=self._watch, args=(other, connection), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world == 1 or self.over:
            return
        if error is None or isinstance(error, SystemExit):  # all were told to stop
            self.leave()
            return
        if not isinstance(error, UserError | RunFailed | KeyboardInterrupt):
            self.lost.wait(GRACE)  # it may be what another's end looks like
        if self.lost.is_set():
            time.sleep(2 * GRACE)  # the thread that noticed ends this process
        if not self._first("told"):
            raise SystemExit(EXIT_PEER_DIED) from None
        if isinstance(error, RuntimeError) and "timed out" in str(error).lower():  # a collective, of gloo or NCCL
            raise RunFailed(self._hung_ranks()) from error
        if not isinstance(error, UserError | RunFailed | KeyboardInterrupt):  # Python tells it below, in full
            self._tell(f"process {self.rank} of {self.world}: {type(error).__name__}")

    def leave(self) -> None:
        """From here on each process ends when it has done; called after the last collective."""
        if self.world == 1 or self.over:
            return
        self.over = True
        for connection in self.others.values():
            with suppress(OSError):  # it has left already
                connection.sendall(BYE)

    def _answered(self) -> Iterator[tuple[int, socket.socket]]:
        """The connections of the first process, by the number of the other."""
        word, family = secrets.token_hex(8), {"family": socket.AF_INET6, "dualstack_ipv6": True}
        with socket.create_server(("", 0), **(family if socket.has_dualstack_ipv6() else {})) as server:
            self.store.set("sdtune/watch", f"{server.getsockname()[1]} {word}")
            waiting = self.world - 1
            while waiting:
                connection, _ = server.accept()
                connection.settimeout(GRACE)  # for a stranger that says nothing
                with suppress(OSError):
                    told, _, number = connection.makefile("rb").readline().decode(errors="replace").partition(" ")
                    if told == word:
                        waiting -= 1
                        connection.settimeout(None)
                        yield int(number), connection

    def _called(self) -> Iterator[tuple[int, socket.socket]]:
        port, _, word = self.store.get("sdtune/watch").decode().partition(" ")
        connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)))
        connection.sendall(f"{word} {self.rank}\n".encode())
        yield 0, connection

    def _watch(self, other: int, connection: socket.socket) -> None:
        """Wait until the connection to another process breaks, or it says that it leaves."""
        try:
            left = connection.recv(1) == BYE
        except OSError:
            left = False
        if not left and not self.over:
            self.lost.set()
            self._end(other)

    def _end(self, other: int) -> None:
        """Leave at once, wherever the main thread hangs; what is on the disk is whole at any moment."""
        here = os.environ.get("LOCAL_WORLD_SIZE") == str(self.world)
        if self._first("told") and not (
            here and RESUME_COMMAND in os.environ
        ):  # `sdtune`, which launched them, knows more
            self._tell(f"process {other} of {self.world} has ended without a word")
        time.sleep(GRACE / 4)  # so that the launcher sees first who was first
        for child in active_children():  # readers of images, which would hold the lock of the run's folder
            child.kill()
        sys.stdout.flush()
        os._exit(EXIT_PEER_DIED)

    def _tell(self, what: str) -> None:
        print(
            f"failed: {what}; {describe_checkpoint(self.out)}; continue with: {self.continuing}",
            file=sys.stderr,
            flush=True,
        )

    def _first(self, what: str) -> bool:
        """Whether this process is the first that asks for ``what``; if nobody can say so any more, the lowest is."""
        try:
            return int(self.store.add(f"sdtune/{what}", 1)) == 1
        except RuntimeError:  # the store went with the first process
            return self.rank == 1

    def _hung_ranks(self) -> str:
        """Which processes have not given up waiting, so that the others wait for them."""
        self.store.add(f"sdtune/waited/{self.rank}", 1)
        time.sleep(GRACE)
        silent = [r for r in range(self.world) if not self.store.check([f"sdtune/waited/{r}"])]
        who = f"process {', '.join(map(str, silent))}" if silent else "another process"
        return (
            f"{who} of {self.world} did not answer for {self.patience} s (--ddp-timeout); {describe_checkpoint(self.out)}; "
            f"continue with: {self.continuing}"
        )
