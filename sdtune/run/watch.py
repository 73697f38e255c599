"""``sdtune watch``: how far runs are, in a table that stays up to date."""

import time
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sdtune.config.scores import score_of, title
from sdtune.config.sections import UserError
from sdtune.config.untrusted import printable
from sdtune.config.verbs import WatchConfig
from sdtune.run import settings, status
from sdtune.run.artefacts import artefact
from sdtune.run.curves import clock, number
from sdtune.run.folder import is_run
from sdtune.run.metrics_file import read_lines

PAUSE = 2.0
"""Seconds between two looks at the runs."""


def watch(cfg: WatchConfig) -> None:
    """Show the runs of ``cfg`` until Ctrl-C; once where the output is no terminal.

    Raises:
        UserError: there is no run, or the one whose report is to be opened has none yet.
    """
    folders = list(runs_in(cfg.runs))
    if not folders:
        raise UserError(f"RUNS {', '.join(map(str, cfg.runs))}: no run there; give the folder of a run, or of several")
    if cfg.open:
        page = folders[0] / "report.html"
        if not page.is_file():
            raise UserError(f"--open: {folders[0]} has no report.html yet; it is written a few seconds after step 0")
        webbrowser.open(page.resolve().as_uri())
    console = Console()
    if cfg.once or not console.is_terminal:
        console.print(table(folders))
        return
    try:
        with Live(table(folders), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(PAUSE)
                live.update(table(list(runs_in(cfg.runs))), refresh=True)
    except KeyboardInterrupt:
        return


def runs_in(folders: Sequence[Path]) -> Iterator[Path]:
    """The runs among ``folders`` and directly in them, in order of their names."""
    for folder in folders:
        if is_run(folder):
            yield folder
        elif folder.is_dir():
            yield from sorted(inner for inner in folder.iterdir() if inner.is_dir() and is_run(inner))


def table(folders: Sequence[Path]) -> Table:
    """A row for each run."""
    shown = Table(box=None, pad_edge=False)
    for head in ("run", "state", "step", "images/s", "left", "loss", "score"):
        shown.add_column(head, justify="right" if head in ("step", "images/s", "left", "loss") else "left")
    for folder in folders:
        shown.add_row(*row(folder))
    return shown


def row(folder: Path) -> list[str]:
    """What the table shows of a run; empty where it is not known."""
    lines, found = read_lines(folder / "metrics.jsonl"), status.read(folder)
    last: dict[str, float] = {}
    for line in lines:
        last |= {name: value for name, value in line.items() if isinstance(value, (int, float))}
    steps = f"{found.step:,}/{found.total:,}" if found else f"{int(last.get('step', 0)):,}"
    state = found.state if found else "finished" if artefact(folder) else "unknown"
    scores = [name for name in last if score_of(name) and not name.endswith(("_low", "_high"))]
    chosen = [name for name in scores if score_of(name) == _criterion(folder)] or scores[-1:]
    return [
        printable(str(folder)),
        state + (f": {printable(found.message)}" if found and found.message else ""),
        steps,
        f"{last['images_per_second']:.3g}" if "images_per_second" in last else "",
        clock(found.seconds_left) if found and found.seconds_left is not None and state == "running" else "",
        f"{last['loss']:.4f}" if "loss" in last else "",
        f"{title(chosen[0])} {number(round(last[chosen[0]], 4))}" if chosen else "",
    ]


def _criterion(folder: Path) -> object:
    """The score by which the run keeps its best step, if it does."""
    try:
        return settings.read(folder).values.get("keep_best")
    except UserError:  # of a damaged config nothing is known
        return None
