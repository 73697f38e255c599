"""Training under faults, for as long as one likes: does the run that was hurt end as the one that was not?

    python bench/soak.py --minutes 20 --seed 1

A course is one run, hurt by every fault of ``FAULTS`` in an order that the seed decides; after each the same command
goes on. In the end its files are compared with those of a run that nothing interrupted. Each attempt is a forked
process, so a course takes seconds. Prints counts; exit code 1 when anything differed, hung, or showed a traceback.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch
from accelerate.state import AcceleratorState

from sdtune.cli import main
from sdtune.run import checkpoints

COMMON = ["--dataset", "tiny-hearts", "--log-steps", "1", "--checkpointing-steps", "2", "--dataloader-num-workers", "0"]
RUNS = {
    "ddpm": [
        *("ddpm", "--steps", "48", "--train-batch-size", "2", "--resolution", "16", "--block-out-channels", "8", "16"),
        *("--attention-resolutions", "8", "--layers-per-block", "1", "--norm-num-groups", "4", "--use-ema"),
        *("--num-validation-images", "0"),
    ],
    "lora": [
        *("lora", "--model", "tiny", "--steps", "40", "--train-batch-size", "1", "--resolution", "64"),
        *("--num-validation-images", "0", "--random-flip", "--caption-dropout", "0.2"),
    ],
}
"""Small runs; the first is the short form's."""
PATIENCE = 300
"""Seconds that an attempt may take."""
UNHEEDED = 10
"""Seconds after a signal within which a run has to be over."""
HANG = "HANG"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth_call(module: Any, name: str, n: int, act: Callable[..., None], wanted: Callable[..., bool] = lambda *_: True):
    """Have the n-th call of a function that is ``wanted`` do something before it does its own work."""
    real, calls = getattr(module, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += wanted(*args)
        if calls[0] == n and wanted(*args):
            act(*args)
        return real(*args, **kwargs)

    setattr(module, name, counted)


def half_then(act: Callable[[], None], tensors: Any, path: Path) -> None:
    Path(path).write_bytes(b"half of a file")
    act()


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def is_root(path: Path) -> bool:
    return path.name == "checkpoints"


def is_old(path: Path, *_: Any) -> bool:
    return path.name.startswith(".old-")


def later(number: int, out: Path, draws: random.Random) -> None:
    """Send this process a signal some time after its next checkpoint."""
    before, wait = checkpoints.found(out / "checkpoints"), draws.uniform(0, 0.2)

    def watch() -> None:
        while checkpoints.found(out / "checkpoints") == before:
            time.sleep(0.002)
        time.sleep(wait)
        os.kill(os.getpid(), number)
        time.sleep(UNHEEDED)
        print(f"{HANG}: {signal.Signals(number).name} is not heeded after {UNHEEDED} s", flush=True)

    Thread(target=watch, daemon=True).start()


def in_save(act: Callable[[], None], out: Path, draws: random.Random) -> None:
    nth_call(checkpoints, "save_file", draws.randrange(3, 9), partial(half_then, act))


def before_flush(out: Path, draws: random.Random) -> None:
    nth_call(checkpoints, "flush", draws.randrange(1, 4), lambda path: die(), is_root)


def in_prune(out: Path, draws: random.Random) -> None:
    nth_call(checkpoints.shutil, "rmtree", 1, lambda path, *_: die(), is_old)


FAULTS: dict[str, tuple[Callable[[Path, random.Random], None], int]] = {
    "killed at any time": (partial(later, signal.SIGKILL), -signal.SIGKILL),
    "killed while a checkpoint is written": (partial(in_save, die), -signal.SIGKILL),
    "killed between a checkpoint's rename and its flush": (before_flush, -signal.SIGKILL),
    "killed while an old checkpoint is removed": (in_prune, -signal.SIGKILL),
    "stopped by SIGTERM": (partial(later, signal.SIGTERM), 128 + signal.SIGTERM),
    "stopped by SIGINT": (partial(later, signal.SIGINT), 128 + signal.SIGINT),
    "disk full": (partial(in_save, no_space), 1),
}
"""Name -> what the process does to itself, and the exit code that it must have."""


def flip(path: Path, draws: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draws: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draws.randrange(path.stat().st_size)])


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit of a checkpoint flipped": flip,
    "a file of a checkpoint cut short": cut,
    "a file of a checkpoint removed": lambda path, draws: path.unlink(),
}
"""What happens to the newest checkpoint on its disk, where an older one is left."""


def damage(name: str, out: Path, draws: random.Random) -> bool:
    """Damage a file of the newest checkpoint; whether there was one to spare."""
    whole = [c for c in checkpoints.found(out / "checkpoints") if checkpoints.verify(c) is None]
    if len(whole) < 2:
        return False
    DAMAGES[name](draws.choice(sorted(whole[-1].iterdir())), draws)
    return True


def tear_metrics(out: Path) -> None:
    """What a power cut leaves of a line."""
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lo\x00\x00\x00')


def attempt(words: list[str], log: Path, hurt: Callable[[], None] = lambda: None) -> int | None:
    """Run a command line in a fork that is hurt; its exit code, ``None`` when it hung."""

    def work() -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        hurt()
        main(words)

    AcceleratorState._reset_state(reset_partial_state=True)
    process = get_context("fork").Process(target=work)
    process.start()
    process.join(PATIENCE)
    hung = process.is_alive()
    process.kill()
    process.join()
    return None if hung else process.exitcode


def result(out: Path) -> dict[str, Any]:
    """What a run leaves behind: a hash of each file, and of metrics what does not depend on the clock."""
    files = {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.rglob("*.safetensors"))
        if "checkpoints" not in p.parts or p.parent == checkpoints.found(out / "checkpoints")[-1]
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return {"files": files, "losses": losses, "left over": [p.name for p in out.rglob(".*") if p.name != ".lock"]}


def course(name: str, folder: Path, draws: random.Random, counts: Counter[str], wanted: dict[str, Any]) -> None:
    """One run under every fault; what went wrong is counted under a name that starts with "WRONG"."""
    out, log = folder / "run", folder / "log"
    words = [*RUNS[name], *COMMON, "--output-dir", str(out)]
    order = draws.sample([*FAULTS, *DAMAGES, "metrics torn"], k=len(FAULTS) + len(DAMAGES) + 1)
    for fault in order:
        if fault in DAMAGES:
            counts[fault] += damage(fault, out, draws)
        elif fault == "metrics torn":
            if (out / "metrics.jsonl").exists():
                tear_metrics(out)
                counts[fault] += 1
        else:
            hurt, expected = FAULTS[fault]
            code = attempt(words, log, partial(hurt, out, draws))
            counts[
                fault if code == expected else "over before the fault" if code == 0 else f"WRONG {fault}: {code}"
            ] += 1
    code = attempt(words, log)
    counts["runs ended"] += code == 0
    counts["WRONG end"] += code != 0
    text = log.read_text()
    counts["WRONG traceback"] += text.count("Traceback")
    counts["WRONG hang"] += text.count(HANG)
    if code == 0:
        got = result(out)
        different = [part for part in wanted if got[part] != wanted[part]]
        counts["runs equal to the uninterrupted one"] += not different
        counts[f"WRONG {', '.join(different)}"] += bool(different)
    if any(key.startswith("WRONG") and counts[key] for key in counts):
        print(text[-4000:], file=sys.stderr)


def soak(seconds: float, seed: int, folder: Path, names: list[str]) -> Counter[str]:
    """At least one course of each name, and more until the time is over."""
    counts: Counter[str] = Counter()
    wanted = {}
    for name in names:
        out = folder / f"whole-{name}"
        code = attempt([*RUNS[name], *COMMON, "--output-dir", str(out)], folder / f"whole-{name}.log")
        assert code == 0, (folder / f"whole-{name}.log").read_text()
        wanted[name] = result(out)
    until, number = time.monotonic() + seconds, 0
    while number < len(names) or time.monotonic() < until:
        name, place = names[number % len(names)], folder / f"course-{number}"
        place.mkdir()
        course(name, place, random.Random(f"{seed} {number}"), counts, wanted[name])
        shutil.rmtree(place)
        number += 1
    return Counter({key: count for key, count in counts.items() if count})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["SDTUNE_CACHE"] = f"{place}/cache"
        found = soak(60 * given.minutes, given.seed, Path(place), list(RUNS))
    for key, count in sorted(found.items()):
        print(f"{count:7,d} {key}")
    sys.exit(any(key.startswith("WRONG") for key in found))
