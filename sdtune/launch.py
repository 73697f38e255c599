"""One command on many processes: run it under torch's launcher, pass signals on, and tell how it really ended."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdtune import options
from sdtune.configs import Run, UserError

ENDED = "exit.json"


def launched() -> bool:
    """Whether a launcher (accelerate, torchrun, Slurm under either) has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def telling(cfg: Run) -> Iterator[None]:
    """Leave the exit code of a launched run in its folder, since launchers turn every failure into 1."""
    code = 1
    try:
        yield
        code = 0
    except UserError:
        code = 2
        raise
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        raise
    finally:
        if launched() and os.environ["RANK"] == "0" and cfg.output_dir.is_dir():
            (cfg.output_dir / ENDED).write_text(json.dumps({"code": code}), encoding="utf-8")


def relaunch(words: list[str], cfg: Run, processes: int, launching: dict[str, Any]) -> int:
    """Run ``sdtune WORDS`` on ``processes`` processes with the resolved config; the exit code of the training.

    With a GPU for each it becomes ``accelerate launch``; without, torch's own launcher starts gloo processes on
    the CPU, since accelerate's wants MPI there.
    """
    import torch

    environment = dict(os.environ)
    if torch.cuda.device_count() >= processes:
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launcher += ["--num_processes", str(processes), "--mixed_precision", cfg.mixed_precision or "no"]
        launcher += ["--dynamo_backend", "no", "-m"]
        if torch.cuda.device_count() > processes:
            print(f"{torch.cuda.device_count()} GPUs are visible, {processes} are used", file=sys.stderr)
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        environment |= {"ACCELERATE_USE_CPU": "true"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    resolved = cfg.output_dir / ".launch.yaml"  # settings travel in a file: no secret or clash of options in argv
    resolved.write_text(options.to_yaml(cfg), encoding="utf-8")
    flags = [options.flag(name) for name, on in launching.items() if on]
    argv = [sys.executable, "-m", *launcher, "sdtune", *words, "--config", str(resolved), *flags]
    print(shlex.join(["python", *argv[1:]]), file=sys.stderr)
    ended = cfg.output_dir / ENDED
    ended.unlink(missing_ok=True)
    child = subprocess.Popen(argv, env=environment, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    code = child.wait()
    try:
        return int(json.loads(ended.read_text(encoding="utf-8"))["code"])  # the training's own, not the launcher's
    except (FileNotFoundError, ValueError):
        return 128 - code if code < 0 else code
