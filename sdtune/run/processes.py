"""The processes of a run end together: when one dies, the others end within a second and report which rank failed.

A launcher stops the others with a signal, and a process that waits in a collective does not handle signals. So each
process keeps a connection open to the first one. It breaks when the process at its other end dies, whatever the cause.
A process that is alive sends a beat over it; one that is stopped (a debugger, a dead file system) does not.
"""

import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from multiprocessing import active_children
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import distributed

from sdtune.config.parsing import same_command
from sdtune.config.sections import Run, RunFailed, UserError
from sdtune.config.untrusted import echo
from sdtune.run import checkpoints
from sdtune.run.barrier import in_barrier
from sdtune.run.signals import Interrupted, StopSignals

RESUME_COMMAND = "SDTUNE_RESUME_COMMAND"
"""Environment variable that holds the command which continues a run that `sdtune` launched on many processes."""
EXIT_PEER_DIED = 75
"""Exit code of a process that ends because another process died."""
LOADER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (is killed by signal: \w+|exited unexpectedly)")
"""What torch says of a loader worker that has died."""
BYE = b"."
"""Sent by a process that has left the last collective, so that its end is no failure."""
GRACE = 2.0
"""Seconds to wait before an error is reported: another process may have caused it."""
BEAT = b"+"
"""Sent now and then by a process that is alive."""
BEAT_SECONDS = 0.5
MIN_SILENCE = 10.0
"""Seconds without a beat below which a process counts as alive, whatever `--ddp-timeout` says."""
STOP_SILENCE = 5.0
"""Seconds without a beat after which a process that was told to stop does not wait for the other."""
CONNECT = 60.0
"""Seconds for which a process tries to reach the first one."""
LOOPBACK = "127.0.0.1"


def resume_command(cfg: Run, words: list[str]) -> str:
    """The command line that continues a run."""
    command = os.environ.get(RESUME_COMMAND) or same_command(cfg, ["sdtune", *words])
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and RESUME_COMMAND not in os.environ
    return f"{command}, under the same launcher" if launched else command


def describe_checkpoint(out: Path) -> str:
    """Which checkpoint a run continues from, as a clause of a message."""
    found = checkpoints.found(out / "checkpoints")  # a checkpoint gets this name when it is complete
    return f"the last checkpoint, {found[-1].name}, is complete" if found else "there is no checkpoint yet"


def listen(host: str) -> socket.socket:
    """A server on one interface: that with the address ``host``, by which the other processes reach this machine.

    Where none has it, since it is translated on its way here, or where it means all: that by which packets to it leave.
    Raises: RunFailed if none leads there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with suppress(OSError):
        if not ip_address(host).is_unspecified:
            return socket.create_server((host, 0), family=family)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 1))  # which sends nothing
            own = probe.getsockname()[0]
        return socket.create_server((own, 0), family=family)
    except OSError as error:
        raise RunFailed(f"MASTER_ADDR means {host}, to which no interface here leads: {error.strerror}") from None


class ProcessGroupWatch:
    """Context in which the first error of any process, or a signal to stop, ends all processes of the run.

    The process that fails reports its error, once. A process that was killed or hangs cannot, so another one names it.
    Errors that only follow from the first are not reported.

    Args:
        rank, world: number of this process, and how many there are. The process group exists already.
        out: the run's folder.
        resume: the command that continues the run.
        patience: seconds after which a process that does not answer counts as hung (`--ddp-timeout`).
        stop: the signals that this process has received.
    """

    def __init__(self, rank: int, world: int, out: Path, resume: str, patience: int, stop: StopSignals):
        self.rank, self.world, self.out, self.resume = rank, world, out, resume
        self.patience, self.stop = patience, stop
        self.left, self.peer_died = False, threading.Event()

    def __enter__(self) -> "ProcessGroupWatch":
        if self.world > 1:
            self.store: Any = distributed.distributed_c10d._get_default_store()
            self.others = dict(self._accept() if self.rank == 0 else self._connect())
            self.heard = dict.fromkeys(self.others, time.monotonic())
            for other, connection in self.others.items():
                os.register_at_fork(after_in_child=connection.close)  # loader workers may outlive their process
                threading.Thread(target=self._watch, args=(other, connection), daemon=True).start()
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Interrupted):
            self._interrupted(error)
            return
        if isinstance(error, RuntimeError) and (reason := LOADER_DIED.match(str(error))):
            if self.world > 1 and not self._is_first("report"):
                raise SystemExit(EXIT_PEER_DIED) from None
            raise RunFailed(
                f"a process that loads images {reason[1]}, as the system does when main memory is full; "
                f"{describe_checkpoint(self.out)}; continue with fewer --dataloader-num-workers: {self.resume}"
            ) from None
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
            hung = self._hung(self._not_waiting())
            raise RunFailed(f"{hung}; {describe_checkpoint(self.out)}; continue with: {self.resume}") from error
        if not isinstance(error, UserError | RunFailed | KeyboardInterrupt):  # the traceback follows
            self._report("failed", f"process {self.rank} of {self.world}: {type(error).__name__}")

    def leave(self) -> None:
        """Called after the last collective: from here on each process may end on its own."""
        if self.world > 1 and not self.left:
            self.left = True
            self._send(BYE)

    def _interrupted(self, error: Interrupted) -> None:
        """This process ends at once because of a signal, and the others with it."""
        alone = self.world == 1 or self.left
        self.left = True
        if not alone:
            self._send(bytes([error.number]))
        if alone or self._is_first("report"):
            self._report("interrupted", f"stopped by {error.name}")

    def _send(self, message: bytes) -> None:
        for connection in self.others.values():
            with suppress(OSError):  # its process has ended already
                connection.sendall(message)

    def _accept(self) -> Iterator[tuple[int, socket.socket]]:
        """The first process: accept a connection from each other rank, on the one interface that they can reach."""
        host = LOOPBACK if self._one_machine else self.store.get("sdtune/host").decode()
        secret = secrets.token_hex(8)
        with listen(host) as server:
            self.store.set("sdtune/watch", f"{host} {server.getsockname()[1]} {secret}")
            waiting = self.world - 1
            while waiting:
                connection, _ = server.accept()
                connection.settimeout(GRACE)  # a stranger may connect and send nothing
                with suppress(OSError):
                    word, _, number = connection.makefile("rb").readline(64).decode(errors="replace").partition(" ")
                    if secrets.compare_digest(word.encode(), secret.encode()):
                        waiting -= 1
                        connection.settimeout(None)
                        yield int(number), connection

    def _connect(self) -> Iterator[tuple[int, socket.socket]]:
        if self.rank == self.world - 1 and not self._one_machine:
            address = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)[0][4][0]
            self.store.set("sdtune/host", str(address))
        host, port, secret = self.store.get("sdtune/watch").decode().split()
        connection = socket.create_connection((host, int(port)), timeout=CONNECT)
        connection.settimeout(None)
        connection.sendall(f"{secret} {self.rank}\n".encode())
        yield 0, connection

    @property
    def _one_machine(self) -> bool:
        return os.environ.get("LOCAL_WORLD_SIZE") == str(self.world)

    def _watch(self, other: int, connection: socket.socket) -> None:
        """Read from another process until it says BYE, is told to stop, or dies."""
        message = BEAT
        while message == BEAT:
            self.heard[other] = time.monotonic()
            try:
                message = connection.recv(1)
            except OSError:
                message = b""
        if message == BYE or self.left:
            self.heard.pop(other, None)
            return
        self.peer_died.set()
        if message:  # it was told to stop, and reports that
            self._exit(128 + message[0])
        launcher_reports = self._one_machine and RESUME_COMMAND in os.environ  # `sdtune` knows the signal
        if self._is_first("report") and not launcher_reports:
            self._report("failed", f"process {other} of {self.world} died without a message")
        self._exit(128 + self.stop.arrived if self.stop.arrived else EXIT_PEER_DIED)

    def _beat(self) -> None:
        """Send beats, and end this process when it waits for one that sends none."""
        while not self.left:
            self._send(BEAT)
            time.sleep(BEAT_SECONDS)
            silence = {rank: time.monotonic() - heard for rank, heard in list(self.heard.items())}
            limit = STOP_SILENCE if self.stop.arrived else max(self.patience, MIN_SILENCE)
            hung = [rank for rank, seconds in silence.items() if seconds > limit]
            if not hung or self.left or not (self.stop.arrived or in_barrier.is_set()):
                continue
            self.peer_died.set()
            # Without the first process there may be no store to ask who reports
            if self._is_first("report") if self.rank == 0 else self.rank == 1:
                self._report("failed", self._hung(hung, round(max(silence.values()))))
            self._exit(128 + self.stop.arrived if self.stop.arrived else 1)

    def _exit(self, code: int) -> None:
        """End this process at once, wherever its main thread is; files on the disk are complete at any moment."""
        time.sleep(GRACE / 4)  # the launcher should see the first failure first
        for child in active_children():  # loader workers, which would keep the run's folder locked
            child.kill()
        sys.stdout.flush()
        os._exit(code)

    def _report(self, how: str, what: str) -> None:
        line = f"{how}: {what}; {describe_checkpoint(self.out)}; continue with: {self.resume}"
        echo(line, err=True)

    def _is_first(self, what: str) -> bool:
        """Whether this process is the first that asks for ``what``; without the store, whether it is rank 1."""
        try:
            return int(self.store.add(f"sdtune/{what}", 1)) == 1
        except RuntimeError:  # the store ended with rank 0
            return self.rank == 1

    def _not_waiting(self) -> list[int]:
        """After a collective has timed out: the ranks that are not waiting in it."""
        self.store.add(f"sdtune/waited/{self.rank}", 1)
        time.sleep(GRACE)
        return [rank for rank in range(self.world) if not self.store.check([f"sdtune/waited/{rank}"])]

    def _hung(self, ranks: list[int], seconds: int | None = None) -> str:
        who = f"process {', '.join(map(str, ranks))}" if ranks else "another process"
        limit = f"{self.patience} s (--ddp-timeout)" if seconds is None else f"{seconds} s"
        return f"{who} of {self.world} did not answer for {limit}"
