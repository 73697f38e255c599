"""Measures how long a run of two processes goes on after one is killed or hangs, and prints its message.

python bench/lost_process.py [--launcher sdtune|torchrun|accelerate] [--signal KILL|STOP] [--process 0|1] [-- OPTIONS]
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LAUNCHERS = {
    "sdtune": [],
    "torchrun": "-m torch.distributed.run --standalone --nproc-per-node 2 -m --".split(),
    "accelerate": (
        "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port 0 -m"
    ).split(),
}


def measure(launcher: str, number: signal.Signals, process: int, options: list[str]) -> None:
    out = Path(tempfile.mkdtemp())
    words = f"lora --config lora/tiny-hearts --output-dir {out} --steps 100000 --checkpointing-steps 20".split()
    words += ["--train-batch-size", "2", "--num-validation-images", "0", "--dataloader-num-workers", "2", *options]
    argv = [*LAUNCHERS[launcher], "sdtune", *words]
    if launcher == "sdtune":
        argv = ["-m", *argv, "--num-processes", "2"]
    if not shutil.which("nvidia-smi"):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    run = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / "checkpoints" / "step-000020").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    workers = psutil.Process(run.pid).children()
    next(p for p in workers if p.environ().get("RANK") == str(process)).send_signal(number)
    since = time.monotonic()
    _, stderr = run.communicate()
    seconds = time.monotonic() - since
    messages = [line.partition("; continue")[0] for line in stderr.splitlines() if line.startswith("failed:")]
    print(
        f"{launcher}, {number.name} to process {process}: exit code {run.returncode} after {seconds:.1f} s; {messages}"
    )
    shutil.rmtree(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--launcher", choices=LAUNCHERS, default="sdtune")
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    parser.add_argument("--process", type=int, default=1)
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    measure(given.launcher, signal.Signals[f"SIG{given.signal}"], given.process, given.options)
