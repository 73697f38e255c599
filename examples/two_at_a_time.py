"""The command line of an example of several rows: trains recipes, two processes at a time, each of one thread.

Two processes of two threads each on two cores wait for one another, and take many times longer.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sdtune.cli import main

TABLE = "\n---- scores\n"
"""What a part prints before its tables."""


def main_of(script: str, parts: Sequence[str], run: Callable[[str, list[str]], tuple[str, list[str]]]) -> None:
    """Do the rows that the command line names, or all, two parts at a time; ends with 1 if one is below its bar.

    Args:
        script: the file of the example.
        parts: names of rows with spaces between; one process does those of a part, one after the other. The part that
            takes longest comes first.
        run: does a row, with the further words of the command line; its table, and the names of what is below its bar.
    """
    began = time.monotonic()
    rows = " ".join(parts).split()
    asked = [word for word in sys.argv[1:] if word in rows]
    words = [word for word in sys.argv[1:] if word not in rows]
    if not asked:
        sys.exit(run_parts(script, parts, words))
    tables = [run(row, words) for row in asked]
    print(TABLE + "\n\n".join(text for text, _ in tables))
    print(f"{time.monotonic() - began:.0f} seconds")
    if below := [name for _, names in tables for name in names]:
        sys.exit(f"below the bar: {', '.join(below)}")


def train(recipe: str, out: str, options: Sequence[str]) -> None:
    """Run a shipped recipe, ``METHOD/NAME``; ends the program if it fails."""
    try:
        main([recipe.partition("/")[0], "--config", recipe, "--output-dir", out, *options])
    except SystemExit as ended:
        if ended.code:
            raise


def run_parts(script: str, parts: Sequence[str], options: Sequence[str]) -> int:
    """Run ``python script part options`` for each part, and print what it printed last, its tables, when it ends.

    Of one that fails before them, everything is printed.

    Returns: the largest exit code.
    """
    began = time.monotonic()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(part: str) -> int:
        line = [sys.executable, script, *part.split(), *options]
        ended = subprocess.run(line, env=one_thread, stdout=subprocess.PIPE, text=True)
        _, mark, table = ended.stdout.rpartition(TABLE)
        print(f"{part}, after {time.monotonic() - began:.0f} s:\n{table if mark else ended.stdout}", flush=True)
        return ended.returncode

    with ThreadPoolExecutor(2) as two:
        codes = list(two.map(run, parts))
    print(f"{time.monotonic() - began:.0f} seconds in all")
    return max(codes)
