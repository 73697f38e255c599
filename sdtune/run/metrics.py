"""What a run reports while it trains: ``metrics.jsonl``, a progress line, trackers, sample sheets.

Only the first process writes. On the others every method does nothing, so the loop need not distinguish them.
Torch is imported only on a GPU, so that `check_trackers` can run before slow imports.
"""

import atexit
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sdtune.config.parsing import plain
from sdtune.config.sections import Run, UserError
from sdtune.config.untrusted import echo
from sdtune.run.contact_sheet import grid, save_sheet
from sdtune.run.curves import clock
from sdtune.run.live_report import LiveReport
from sdtune.run.metrics_file import cut_off
from sdtune.run.step_times import StepTimes

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKERS = {
    "tensorboard": ("tensorboard", "sdtune[tensorboard]"),
    "wandb": ("wandb", "sdtune[wandb]"),
    "trackio": ("trackio", "sdtune[trackio]"),
    "mlflow": ("mlflow", "mlflow"),
    "swanlab": ("swanlab", "swanlab"),
    "comet_ml": ("comet_ml", "comet_ml"),
    "clearml": ("clearml", "clearml"),
    "aim": ("aim", "aim"),
    "dvclive": ("dvclive", "dvclive"),
}
"""Trackers that accelerate knows: the module each needs, and what to install for it."""

PLAIN_SECONDS = 10.0
"""Least time between two progress lines where output is no terminal, which would have one live line."""


def check_trackers(report_to: list[str]) -> None:
    """Raise `UserError` for a tracker that is unknown or not installed; accelerate would drop it silently."""
    for name in report_to:
        if name == "all":
            continue
        if name not in TRACKERS:
            raise UserError(f"--report-to {name}: no such tracker; choose from {', '.join(TRACKERS)}, all")
        module, package = TRACKERS[name]
        if find_spec(module) is None:
            raise UserError(f"--report-to {name}: {module} is not installed; pip install '{package}'")


class Metrics:
    """Writes a run's numbers and images.

    ``metrics.jsonl`` gets an object a line: ``step``, ``seconds`` (wall time since step 0, summed over
    continuations) and what `log` is given; beside a ``loss`` also ``images_per_second`` (of all processes,
    without the time in `paused`), the shares of that time in the parts of a step (``data_wait``, ``forward``,
    ``backward``, ``optimizer``, ``rest``; 0 to 1) and ``peak_memory`` (bytes of this process: on the GPU if there is
    one, else resident). Numbers that are not finite become ``null``.

    Args:
        cfg: the run; its ``output_dir`` receives the files.
        accelerator: made with ``log_with=cfg.report_to`` and a ``project_dir``.
        first_step: optimizer steps already done; later lines, left by an interrupted run, are removed.
        total_steps: optimizer steps at the end of the run.
    """

    def __init__(self, cfg: Run, accelerator: "Accelerator", first_step: int, total_steps: int) -> None:
        self.active = accelerator.is_main_process
        self.times = StepTimes(self.active and accelerator.device.type == "cuda")
        if not self.active:
            return
        self.cfg, self.accelerator, self.total_steps = cfg, accelerator, total_steps
        self.images_per_step = cfg.train_batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
        cfg.output_dir.mkdir(parents=True, exist_ok=True)
        self.path = cfg.output_dir / "metrics.jsonl"
        self.seconds_before = cut_off(self.path, first_step)
        self.path.touch()
        self.trackers = self._start_trackers(first_step)
        self.start = self.mark = self.last_print = time.monotonic()
        self.first_step = self.step = self.marked_step = first_step
        self.printed_step = -1
        self.away_since_mark = 0.0
        self.loss, self.rate = math.nan, math.nan
        self.live = self._live_line(first_step)
        self.report = LiveReport(cfg.output_dir, total_steps)

    def advance(self, step: int) -> None:
        """``step`` optimizer steps are done: move the progress line. Costs microseconds."""
        if self.active:
            self.step = step
            if self.live:
                self.live.update(self.live.task_ids[0], completed=step, text=self._text())

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a line of ``metrics.jsonl``; ``values`` win over what is measured here."""
        if not self.active:
            return
        self.step = step
        line = {"step": step, **values}
        if "loss" in values:
            line = {"step": step, **self._measured(step), **values}
            self.loss, self.rate = line["loss"], line["images_per_second"]
        line["seconds"] = round(self.seconds_before + time.monotonic() - self.start, 3)
        finite = {name: value for name, value in line.items() if math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:  # not held open: a run that fails need not close it
            file.write(json.dumps(line | dict.fromkeys(line.keys() - finite.keys())) + "\n")
        numbers = {name: value for name, value in finite.items() if name != "step"}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)
        self.advance(step)
        with self.paused():
            self.report.update(step, self._seconds_left())
        now = time.monotonic()
        due = now - self.last_print >= PLAIN_SECONDS or step >= self.total_steps
        if not self.live and due and step != self.printed_step:  # a step may be logged twice: training, then holdout
            self.last_print, self.printed_step = now, step
            echo(f"step {step}/{self.total_steps}  {self._text()}", err=True)

    def images(self, step: int, images: list[Image.Image], prompts: list[str]) -> None:
        """Save ``samples/step-000200.png``, a sheet with the prompts as captions, and give it to trackers."""
        if not self.active or not images:
            return
        sheet = grid(images, prompts)
        save_sheet(sheet, self.cfg.output_dir / "samples" / f"step-{step:06d}.png")
        for tracker in self.trackers:
            _track_image(tracker, sheet, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (sampling, saving, the holdout) is not training and counts towards no throughput."""
        begin = time.monotonic()
        yield
        if self.active:
            self.away_since_mark += time.monotonic() - begin

    def close(self) -> None:
        """Finish the progress line and the trackers; safe to call twice."""
        if not self.active:
            return
        self.active = False
        if self.live:
            self.live.stop()
        for tracker in self.trackers:
            tracker.finish()

    def _measured(self, step: int) -> dict[str, float]:
        """Throughput since the previous call of this, and memory so far."""
        now = time.monotonic()
        seconds = max(now - self.mark - self.away_since_mark, 1e-9)
        measured = {
            "images_per_second": round((step - self.marked_step) * self.images_per_step / seconds, 4),
            **self.times.shares(seconds),
            "peak_memory": _peak_memory(self.accelerator.device),
        }
        self.mark, self.marked_step, self.away_since_mark = now, step, 0.0
        return measured

    def _text(self) -> str:
        parts = [] if math.isnan(self.loss) else [f"loss {self.loss:.4f}"]
        if self.rate > 0:  # not NaN, not 0
            parts.append(f"{self.rate:.3g} images/s")
        if (left := self._seconds_left()) is not None:
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        """Wall time until the last step, pauses included: that is what the person waits for; None at the first step."""
        done = self.step - self.first_step
        return (time.monotonic() - self.start) / done * (self.total_steps - self.step) if done else None

    def _live_line(self, first_step: int) -> Progress | None:
        console = Console(stderr=True)
        if not console.is_terminal:
            return None
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        live = Progress(*columns, console=console, refresh_per_second=4)
        live.add_task("", total=self.total_steps, completed=first_step, text="")
        live.start()
        atexit.register(live.stop)  # which shows the cursor again, however the run ends
        return live

    def _start_trackers(self, first_step: int) -> list[Any]:
        if not self.cfg.report_to:
            return []
        name = self.cfg.output_dir.resolve().name
        options = {
            "tensorboard": {"purge_step": first_step + 1 if first_step else None},
            "wandb": {"name": name, "dir": str(self.cfg.output_dir)},
            "trackio": {"name": name},
        }
        self.accelerator.init_trackers(
            self.cfg.tracker_project_name, config=tracker_values(plain(self.cfg)), init_kwargs=options
        )
        return list(self.accelerator.trackers)


def tracker_values(values: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """A config as trackers accept it: lists joined by commas, None as ``none``, paths and all other values as text."""

    def one(value: Any) -> str | int | float | bool:
        if isinstance(value, (str, int, float, bool)):
            return value
        if isinstance(value, (list, tuple)):
            return ", ".join(map(str, value))
        return "none" if value is None else str(value)

    return {k: one(v) for k, v in values.items()}


def _track_image(tracker: Any, sheet: Image.Image, step: int) -> None:
    """Give a sheet to a tracker that accepts images, each in its own form; the others get none."""
    if tracker.name == "tensorboard":
        import numpy

        tracker.log_images({"samples": numpy.asarray(sheet)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        tracker.log_images({"samples": [sheet]}, step=step)
    elif tracker.name == "trackio":
        import trackio  # type: ignore[import-not-found]

        tracker.log({"samples": trackio.Image(sheet)}, step=step)


def _peak_memory(device: Any) -> float:
    """Bytes: the allocator's peak on a GPU, else the peak resident set of the process; NaN where unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return math.nan
    status = Path("/proc/self/status")  # on Linux, where rusage also counts the parent before the fork
    if status.exists():
        peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
