"""``trace.json``: what CPU and GPU do in a few steps, for https://ui.perfetto.dev or chrome://tracing."""

from collections.abc import Callable
from pathlib import Path

import torch

FILE = "trace.json"


class Profile:
    """Records the steps after the first one, which does what is done once.

    Args:
        steps: how many to record; 0 records nothing.
        folder: that of the run.
        log: gets the line that names the file.
    """

    def __init__(self, steps: int, folder: Path, log: Callable[[str], None]):
        self.left, self.file, self.log = steps, folder / FILE, log
        self.running: torch.profiler.profile | None = None

    def end_step(self) -> None:
        """A step is done."""
        if self.running is None and self.left:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.running = torch.profiler.profile(activities=kinds)
            self.running.start()
        elif self.running:
            self.left -= 1
            if not self.left:
                self.close()

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        if self.running:
            self.running.stop()
            self.running.export_chrome_trace(str(self.file))
            self.running, self.left = None, 0
            self.log(f"trace of some steps: {self.file}; open it at https://ui.perfetto.dev")
