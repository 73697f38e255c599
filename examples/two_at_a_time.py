"""Runs the parts of an example two at a time, each in a process of one thread.

Two processes of two threads each on two cores wait for one another, and take many times longer.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def run_parts(script: str, parts: Sequence[str], options: Sequence[str]) -> int:
    """Run ``python script part options`` for each part, and print what it printed last, its table, when it ends.

    A part prints a line of ``TABLE`` before its table; of one that fails, everything is printed.

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


TABLE = "\n---- scores\n"
