"""Trains recipes, and runs the parts of an example two at a time, each in a process of one thread.

Two processes of two threads each on two cores wait for one another, and take many times longer.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sdtune.cli import main

TABLE = "\n---- scores\n"
"""What a part prints before its table."""


def train(recipe: str, out: str, options: Sequence[str]) -> None:
    """Run a shipped recipe, ``METHOD/NAME``; ends the program if it fails."""
    try:
        main([recipe.partition("/")[0], "--config", recipe, "--output-dir", out, *options])
    except SystemExit as ended:
        if ended.code:
            raise


def run_parts(script: str, parts: Sequence[str], options: Sequence[str]) -> int:
    """Run ``python script part options`` for each part, and print what it printed last, its table, when it ends.

    Of one that fails before its table, everything is printed.

    Args:
        parts: names that the script takes, several with spaces between, the one that takes longest first.

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
