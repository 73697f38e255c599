"""Compares training with and without the cache of VAE moments and text embeddings, in CPU seconds a step.

    python bench/cache.py --rounds 3 [--model DIR --dataset DIR --resolution 256 --steps 10]

Rounds alternate, so that a busy machine slows both equally. Seconds are CPU seconds of this process after the first
step; only their ratio within one call is meaningful.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from sdtune.cli import main
from sdtune.training import state


def cpu_seconds_per_step(options: list[str], steps: int) -> float:
    """CPU seconds of a step of ``sdtune lora``, from when its weights are ready to when they are first saved."""
    clock: list[float] = []
    restore, save = state.State.restore, state.State.save

    def started(self, *args):
        restore(self, *args)
        clock.append(time.process_time())

    def ended(self):
        clock.append(time.process_time())
        save(self)

    state.State.restore, state.State.save = started, ended
    try:
        main(["lora", *options, "--steps", str(steps), "--checkpointing-steps", "0", "--overwrite"])
    except SystemExit as done:
        if done.code:
            raise
    finally:
        state.State.restore, state.State.save = restore, save
    return (clock[1] - clock[0]) / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dataset", default="tiny-hearts")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["SDTUNE_CACHE"] = str(Path(work) / "cache")
        options = ["--model", given.model, "--dataset", given.dataset, "--resolution", str(given.resolution)]
        options += ["--output-dir", f"{work}/run", "--train-batch-size", "1", "--num-validation-images", "0"]
        options += ["--dataloader-num-workers", "0"]
        arms: dict[str, list[float]] = {"--cache": [], "--no-cache": []}
        for _ in range(given.rounds):
            for arm, seconds in arms.items():
                seconds.append(cpu_seconds_per_step([*options, arm], given.steps))
        cached, fresh = (statistics.median(seconds) for seconds in arms.values())
        print(f"cached {cached:.4f}, not cached {fresh:.4f} CPU seconds a step; ratio {fresh / cached:.2f}")
