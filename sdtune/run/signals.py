"""SIGTERM, SIGUSR1 and Ctrl-C set a flag. The step is finished and saved, then all processes stop together."""

import signal
from datetime import timedelta
from typing import Any

import torch

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Slurm sends SIGUSR1 before a job's time ends; `--signal` sets how long before."""


class Stopping:
    """Args: world: processes; patience: seconds for which one waits for the others to ask.

    Before ``training`` is set there is nothing to save, and Ctrl-C ends the process where it is.
    """

    def __init__(self, world: int, patience: int):
        self.signal, self.training = 0, False
        wait = timedelta(seconds=patience)
        self.peers = torch.distributed.new_group(backend="gloo", timeout=wait) if world > 1 else None
        for number in STOP:
            signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and (self.signal == number or not self.training):
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.signal = number

    def agreed(self) -> bool:
        """Whether any process was told to stop. All processes ask at the same step and get the same answer.

        The flag travels over gloo, so that asking does not make the host wait for the GPU.
        """
        number = self.signal
        if self.peers is not None:
            flag = torch.tensor(number)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.peers)
            number = int(flag)
        self.signal = number or self.signal  # a signal that came meanwhile counts at the next step
        return number != 0
