"""``metrics.jsonl``, read again: by a run that continues, by its report, and by what compares runs."""

import json
import os
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` with a step; what is damaged, such as an incomplete last line, is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            if isinstance(found := json.loads(line), dict) and isinstance(found.get("step"), int):
                lines.append(found)
        except (ValueError, RecursionError):
            continue
    return lines


def cut_off(path: Path, first_step: int) -> float:
    """Keep the lines of ``path`` up to ``first_step``, and no line for 0; return the ``seconds`` of the last one.

    The other lines were written by an interrupted run after its last checkpoint; the last of them may be incomplete.
    """
    lines, seconds = [], 0.0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            if not 0 < first_step >= line["step"]:
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        lines.append(text + "\n")
        seconds = line.get("seconds") or seconds
    if path.exists():
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as out:
            out.writelines(lines)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    return seconds
