"""The processes of a run end together: when one dies, the others end within a second and report which rank failed.

A launcher stops the others with a signal, and a process that waits in a collective does not handle signals. So each
process keeps a connection open to the first one. It breaks when the process at its other end dies, whatever the cause.
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
"""Environment variable that holds the command which continues a run that `sdtune` launched on many processes."""
EXIT_PEER_DIED = 75
"""Exit code of a process that ends because another process died."""
BYE = b"."
"""Sent by a process that has left the last collective, so that its end is no failure."""
GRACE = 2.0
"""Seconds to wait before an error is reported: another process may have caused it."""
POLL = 0.05
"""Seconds between two reads of a counter in the store."""


def store_barrier() -> None:
    """Wait until all processes have called this, however long one of them works alone (writes, encodes, samples).

    A collective would fail after `--ddp-timeout`; this polls counters in the store. A process that dies meanwhile is
    noticed by the thread that watches it (see `ProcessGroupWatch`).
    """
    if not distributed.is_initialized():
        return
    world, store = distributed.get_world_size(), distributed.distributed_c10d._get_default_store()
    # No process enters the next barrier before all have entered this one, so the count gives the barrier's number
    number = math.ceil(store.add("sdtune/entered", 1) / world)
    wait_for(store, "sdtune/entered", number * world)
    store.add("sdtune/left", 1)
    if distributed.get_rank() == 0:  # it may host the store, which must outlive the others' reads
        wait_for(store, "sdtune/left", number * world)


def wait_for(store: Any, key: str, count: int) -> None:
    while store.add(key, 0) < count:
        time.sleep(POLL)


def resume_command(cfg: Run, words: list[str]) -> str:
    """The command line that continues a run."""
    command = os.environ.get(RESUME_COMMAND) or same_command(cfg, ["sdtune", *words])
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and RESUME_COMMAND not in os.environ
    return f"{command}, under the same launcher" if launched else command


def describe_checkpoint(out: Path) -> str:
    """Which checkpoint a run continues from, as a clause of a message."""
    found = checkpoints.found(out / "checkpoints")  # a checkpoint gets this name when it is complete
    return f"the last checkpoint, {found[-1].name}, is complete" if found else "there is no checkpoint yet"


class ProcessGroupWatch:
    """Context in which the first error of any process ends all processes of the run.

    The process that fails reports its error, once. A process that was killed cannot, so another one names it. Errors
    that only follow from the first are not reported.

    Args:
        rank, world: number of this process, and how many there are. The process group exists already.
        out: the run's folder.
        resume: the command that continues the run.
        patience: seconds after which a collective fails (`--ddp-timeout`), for the message.
    """

    def __init__(self, rank: int, world: int, out: Path, resume: str, patience: int):
        self.rank, self.world, self.out, self.resume, self.patience = rank, world, out, resume, patience
        self.left, self.peer_died = False, threading.Event()

    def __enter__(self) -> "ProcessGroupWatch":
        if self.world > 1:
            self.store: Any = distributed.distributed_c10d._get_default_store()
            self.others = dict(self._accept() if self.rank == 0 else self._connect())
            for other, connection in self.others.items():
                os.register_at_fork(after_in_child=connection.close)  # loader workers may outlive their process
                threading.Thread(target=self._watch, args=(other, connection), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world == 1 or self.left:
            return
        if error is None or isinstance(error, SystemExit):  # all processes agreed to stop
            self.leave()
            return
        if not isinstance(error, UserError | RunFailed | KeyboardInterrupt):
            self.peer_died.wait(GRACE)  # the death of another process may have caused it
        if self.peer_died.is_set():
            time.sleep(2 * GRACE)  # the watching thread ends this process
        if not self._is_first("report"):
            raise SystemExit(EXIT_PEER_DIED) from None
        if isinstance(error, RuntimeError) and "timed out" in str(error).lower():  # a collective, of gloo or NCCL
            raise RunFailed(self._hung_ranks()) from error
        if not isinstance(error, UserError | RunFailed | KeyboardInterrupt):  # the traceback follows
            self._report(f"process {self.rank} of {self.world}: {type(error).__name__}")

    def leave(self) -> None:
        """Called after the last collective: from here on each process may end on its own."""
        if self.world == 1 or self.left:
            return
        self.left = True
        for connection in self.others.values():
            with suppress(OSError):  # its process has ended already
                connection.sendall(BYE)

    def _accept(self) -> Iterator[tuple[int, socket.socket]]:
        """The first process: accept a connection from each other rank."""
        secret, dual = secrets.token_hex(8), socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
            self.store.set("sdtune/watch", f"{server.getsockname()[1]} {secret}")
            waiting = self.world - 1
            while waiting:
                connection, _ = server.accept()
                connection.settimeout(GRACE)  # a stranger may connect and send nothing
                with suppress(OSError):
                    word, _, number = connection.makefile("rb").readline().decode(errors="replace").partition(" ")
                    if word == secret:
                        waiting -= 1
                        connection.settimeout(None)
                        yield int(number), connection

    def _connect(self) -> Iterator[tuple[int, socket.socket]]:
        port, _, secret = self.store.get("sdtune/watch").decode().partition(" ")
        connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)))
        connection.sendall(f"{secret} {self.rank}\n".encode())
        yield 0, connection

    def _watch(self, other: int, connection: socket.socket) -> None:
        """Wait until the connection to another process breaks, or until that process says BYE."""
        try:
            said_bye = connection.recv(1) == BYE
        except OSError:
            said_bye = False
        if not said_bye and not self.left:
            self.peer_died.set()
            self._exit_after(other)

    def _exit_after(self, other: int) -> None:
        """End this process at once, wherever its main thread is; files on the disk are complete at any moment."""
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self.world)
        launcher_reports = one_machine and RESUME_COMMAND in os.environ  # `sdtune` launched them, and knows the signal
        if self._is_first("report") and not launcher_reports:
            self._report(f"process {other} of {self.world} died without a message")
        time.sleep(GRACE / 4)  # the launcher should see the first failure first
        for child in active_children():  # loader workers, which would keep the run's folder locked
            child.kill()
        sys.stdout.flush()
        os._exit(EXIT_PEER_DIED)

    def _report(self, what: str) -> None:
        print(
            f"failed: {what}; {describe_checkpoint(self.out)}; continue with: {self.resume}",
            file=sys.stderr,
            flush=True,
        )

    def _is_first(self, what: str) -> bool:
        """Whether this process is the first that asks for ``what``; without the store, whether it is rank 1."""
        try:
            return int(self.store.add(f"sdtune/{what}", 1)) == 1
        except RuntimeError:  # the store ended with rank 0
            return self.rank == 1

    def _hung_ranks(self) -> str:
        """The message of a collective that timed out: it names the ranks that are not waiting in it."""
        self.store.add(f"sdtune/waited/{self.rank}", 1)
        time.sleep(GRACE)
        hung = [r for r in range(self.world) if not self.store.check([f"sdtune/waited/{r}"])]
        who = f"process {', '.join(map(str, hung))}" if hung else "another process"
        return (
            f"{who} of {self.world} did not answer for {self.patience} s (--ddp-timeout); "
            f"{describe_checkpoint(self.out)}; continue with: {self.resume}"
        )
