"""SIGTERM, SIGUSR1 and Ctrl-C raise a flag; the step is finished and saved, and then all processes stop together."""

import signal
from datetime import timedelta
from typing import Any

import torch

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Slurm sends SIGUSR1 as early before the end of a job's time as `--signal` says."""


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
        """Whether any process was told to stop; all of them ask at the same step, and get the same answer.

        The flag travels over gloo, so that asking does not make the host wait for the GPU.
        """
        told = self.signal
        if self.peers is not None:
            flag = torch.tensor(told)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.peers)
            told = int(flag)
        self.signal = told or self.signal  # one that came in the meantime counts at the next step
        return told != 0
