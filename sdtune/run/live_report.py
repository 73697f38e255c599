"""Keeps the report of a run up to date while it goes on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdtune.run import status
from sdtune.run.report import write_report
from sdtune.run.status import State, Status

SHARE = 0.01
"""Largest share of a run's time that its report may take."""
FIRST = 5.0
"""Seconds before the report of a new run is written for the first time; many a test run ends sooner."""


class LiveReport:
    """Writes ``status.json`` at each line of metrics, and ``report.html`` as often as `SHARE` allows.

    Args:
        folder: the run's folder.
        total: optimizer steps at the end of the run.
    """

    def __init__(self, folder: Path, total: int):
        self.folder, self.total = folder, total
        self.due = time.monotonic() + FIRST

    def update(self, step: int, seconds_left: float | None) -> None:
        """The run has done ``step`` steps."""
        with suppress(OSError):  # a full disk: the next checkpoint tells, and can say what to do
            status.write(self.folder, Status("running", step, self.total, time.time(), seconds_left))
            begin = time.monotonic()
            if begin >= self.due:
                write_report(self.folder)
                end = time.monotonic()
                self.due = end + max(FIRST, (end - begin) / SHARE)

    def finish(self, step: int) -> Path:
        """The run is complete: write its last report, and return the path of it."""
        status.write(self.folder, Status("finished", step, self.total, time.time()))
        return write_report(self.folder)


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Context of a run: how it ends is written into its status and its report.

    A run that was refused before its first step leaves what an earlier one wrote.
    """
    try:
        yield
    except BaseException as error:
        last = status.read(folder)
        if last and last.state == "running":
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            line = "" if stopped else (str(error) or type(error).__name__).splitlines()[0]
            state: State = "interrupted" if stopped else "failed"
            with suppress(OSError):  # a full disk must not hide the error
                status.write(folder, last._replace(state=state, written=time.time(), message=line, seconds_left=None))
                write_report(folder)
        raise
