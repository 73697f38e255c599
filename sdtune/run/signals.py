"""SIGTERM, SIGUSR1 and Ctrl-C end a run within seconds.

In the training loop they are deferred: the step is finished and saved, then all processes stop together. Everywhere
else (models load, caches fill, class images or previews are drawn, files are uploaded) they end the process at once,
as there is nothing to save that is not saved already.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Slurm sends SIGUSR1 before a job's time ends; `--signal` sets how long before."""


class Interrupted(SystemExit):
    """A signal that asks to stop has come. Not an `Exception`, so that no handler of errors takes it for one."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name


class StopSignals:
    """Context in which the signals that ask to stop are handled; the handlers before it are put back."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that came; 0 before."""
        self.arrived = 0
        """The same, known to other threads even while the main thread waits in a collective."""
        self.deferring = False
        self.group: Any = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP:
            self.before[number] = signal.signal(number, self._handle)
        self.pid, (self.reading, writing) = os.getpid(), socket.socketpair()
        writing.setblocking(False)
        self.writing = writing
        self.wakeup_before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        signal.set_wakeup_fd(self.wakeup_before)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.writing.close()  # which ends the thread

    def connect(self, world: int, patience: int) -> None:
        """Make the group in which ``world`` processes agree; one waits for the others ``patience`` seconds."""
        wait = timedelta(seconds=patience)
        self.group = torch.distributed.new_group(backend="gloo", timeout=wait) if world > 1 else None

    def defer(self, deferring: bool) -> None:
        """From here on signals are noted for `agreed`, or end the process at once.

        Raises:
            Interrupted: one was noted, and is not deferred any more.
        """
        self.deferring = deferring
        if self.number and not deferring:
            raise Interrupted(self.number)

    def attempt(self, work: Callable[[], T], interruptible: bool) -> T | None:
        """``work()``; None if a deferred signal has ended it early, which only ``interruptible`` work allows."""
        if not (self.deferring and interruptible):
            return work()
        try:
            self.deferring = False
            return None if self.number else work()
        except Interrupted:
            return None
        finally:
            self.deferring = True

    def agreed(self) -> bool:
        """Whether any process was told to stop. All processes ask at the same step and get the same answer.

        The flag travels over gloo, so that asking does not make the host wait for the GPU.
        """
        number = self.number
        if self.group is not None:
            flag = torch.tensor(number)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
            number = int(flag)
        self.number = number or self.number  # a signal that came meanwhile counts at the next step
        return number != 0

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a loader worker: its parent decides
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        second = number == signal.SIGINT == self.number
        self.number = number
        if second or not self.deferring:
            raise Interrupted(number)

    def _forget(self) -> None:
        """In a forked process: its signals are none of this one's."""
        if signal.getsignal(signal.SIGTERM) == self._handle and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)

    def _listen(self) -> None:
        """Note signals as they arrive; Python's own handlers wait until the main thread returns from a library."""
        with self.reading:
            while numbers := self.reading.recv(16):
                self.arrived = next((n for n in reversed(numbers) if n in STOP), self.arrived)
