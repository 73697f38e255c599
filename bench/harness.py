"""What the benchmarks share: arms in turn in one run, ratios with their spread, the machine, JSON and a table.

A busy machine slows all arms alike when they run in turn, so the ratios of one run mean something where its seconds
do not. Time is CPU time of the process and its children, unless a figure says otherwise.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Arms = Mapping[str, Callable[[], float]]
"""A name to what measures once; less is better."""


class Figure(NamedTuple):
    """What was measured of an arm."""

    values: list[float]
    ratios: list[float]
    """To the first arm, round by round."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


class Usage(NamedTuple):
    """What a process used, with its children."""

    cpu: float
    wall: float
    peak: int
    """Bytes resident at the most."""
    printed: str


def parser(doc: str | None, rounds: int = 3) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="how often each arm runs, in turn")
    made.add_argument("--json", type=Path, help="where to write all that was measured; leave out for the table alone")
    return made


def in_turn(arms: Arms, rounds: int) -> dict[str, Figure]:
    """Measure each arm ``rounds`` times, one after the other."""
    values: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, measure in arms.items():
            values[name].append(measure())
    return figures(values)


def figures(values: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """Figures of what was measured of arms in turn."""
    first = next(iter(values.values()))
    return {
        name: Figure(list(own), [value / other for value, other in zip(own, first, strict=True)])
        for name, own in values.items()
    }


def run(words: Sequence[str], **environment: str) -> Usage:
    """Run Python with ``words``; exits with its last lines if it fails."""
    begun = time.perf_counter()
    # Of its own, so that the peak of one is not that of another
    child = subprocess.Popen(
        [sys.executable, *words], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    printed = child.stdout.read().decode(errors="replace")
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(words)}:\n{printed[-3000:]}")
    return Usage(used.ru_utime + used.ru_stime, time.perf_counter() - begun, peak_of(used), printed)


def peak_of(used: resource.struct_rusage) -> int:
    """Bytes; Linux counts in kilobytes."""
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """The machine, its load, and the versions that matter."""
    import diffusers
    import peft
    import torch
    import transformers

    names = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    return {
        "processor": next(iter(names), platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }


def on_what() -> str:
    """The machine in one line."""
    known = machine()
    cores = f"{known['cores']} cores, {known['threads']} threads a process, load {known['load'][0]}"
    versions = ", ".join(f"{name} {known[name]}" for name in ("python", "torch", "diffusers", "peft", "transformers"))
    return f"on {known['gpu'] or 'no GPU'}, {known['processor']}, {cores}; {versions}"


def cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines)


def report(title: str, found: Mapping[str, Figure], unit: str, file: Path | None, scale: float = 1.0) -> None:
    """Print a table of arms and the machine in a line, and write both to ``file``.

    Args:
        scale: by what values are multiplied for the table, such as 1000 for milliseconds.
    """
    rows = []
    for name, figure in found.items():
        low, high = (scale * end for end in (min(figure.values), max(figure.values)))
        ratio = f"{figure.ratio:.3f} ({min(figure.ratios):.3f} to {max(figure.ratios):.3f})"
        rows.append([name, f"{scale * figure.median:.4g}", f"{low:.4g} to {high:.4g}", ratio])
    print(table([title, unit, "spread", "ratio to the first (spread)"], rows))
    print(on_what(), flush=True)
    write({"what": title, "unit": unit, "arms": {name: figure.values for name, figure in found.items()}}, file)


def write(facts: Mapping[str, Any], file: Path | None) -> None:
    """Add facts, with the machine and the command, to the list in ``file``."""
    if file is None:
        return
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    entry = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "machine": machine(), **facts}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([*before, entry], indent=1), encoding="utf-8")
