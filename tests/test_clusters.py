"""The scripts for Slurm do what they say: their own commands, on two processes, under a scheduler that is played."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sdtune.config import shipped
from tests import ranks
from tests.compare import assert_same_bits, difference
from tests.conftest import LONG, command
from tests.ranks import reached, wait_until

SCRIPTS = {name.partition("/")[2]: path for name, path in shipped.ready_made("slurm").items()}

SRUN = """#!/bin/bash
# As many tasks as the job has; signals go to all of them, and the worst exit code is srun's.
tasks=()
for (( k = 0; k < SLURM_NTASKS; k++ )); do
    SLURM_PROCID=$k SLURM_LOCALID=$k "$@" & tasks+=($!)
done
for name in USR1 TERM; do trap "kill -$name ${tasks[*]} 2> /dev/null" $name; done
worst=0
for task in "${tasks[@]}"; do
    while wait $task; code=$?; kill -0 $task 2> /dev/null; do :; done
    (( code > worst )) && worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo 127.0.0.1; echo elsewhere ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


class Slurm:
    """A scheduler with one machine.

    Args:
        place: folder of its commands, and the folder in which jobs run.
        python: what stands in for `python -m sdtune`.
    """

    def __init__(self, place: Path, python: Path):
        self.place, self.requeued = place, place / "requeued"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (place / name).write_text(text)
            (place / name).chmod(0o755)
        (place / "sdtune").symlink_to(python)

    def sbatch(self, script: Path, words: list[str], **variables: str) -> subprocess.Popen:
        """Start a job, with what Slurm tells it."""
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE))
        assert asked["signal"] == "B:USR1@120" and "requeue" in asked  # what the scripts rely on
        path = f"{self.place}:{os.environ['PATH']}"
        told = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": asked["job-name"],
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_GPUS_ON_NODE": "2",
            "REQUEUED": str(self.requeued),
            "OMP_NUM_THREADS": "1",
        }
        with (self.place / "slurm.out").open("a") as out:
            argv = ["bash", str(script), *words]
            return subprocess.Popen(
                argv, cwd=self.place, env=os.environ | told | variables | {"PATH": path}, stdout=out, stderr=out
            )

    def printed(self) -> str:
        return (self.place / "slurm.out").read_text()


@pytest.fixture
def slurm(tmp_path, python) -> Slurm:
    return Slurm(tmp_path, python)


def node(slurm, places, uninterrupted):
    """Two minutes before its time is over; then the job is put back into the queue, and starts again."""
    out = slurm.place / "run"
    words = command(*places[:2], out, *LONG)
    job = slurm.sbatch(SCRIPTS["node"], words)
    wait_until(lambda: reached(out, 3) and job.poll() is None)
    job.send_signal(signal.SIGUSR1)  # to the shell alone, as B: says
    assert job.wait(60) == 128 + signal.SIGUSR1, slurm.printed()
    assert slurm.requeued.read_text() == "4711\n"
    assert "continue with: sdtune lora" in slurm.printed()
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    assert "continuing at step" in ranks.train(2, words, slurm.place / "output")
    assert_same_bits(uninterrupted, out)


def nodes(slurm, places, uninterrupted):
    """A task on each GPU, and no launcher; preempted, which is for Slurm to requeue."""
    out = slurm.place / "run"
    words = command(*places[:2], out, *LONG)
    job = slurm.sbatch(SCRIPTS["nodes"], words)
    wait_until(lambda: reached(out, 3) and job.poll() is None)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 128 + signal.SIGTERM, slurm.printed()
    assert not slurm.requeued.exists()
    ranks.train(2, words, slurm.place / "output")
    assert_same_bits(uninterrupted, out)


def array(slurm, places, uninterrupted):
    """A run for each seed, each on the one GPU that the script asks for."""
    learnt = []
    words = command(*places[:2], Path("unused"), "--steps", "2")
    for k in range(2):
        told = {"SLURM_ARRAY_TASK_ID": str(k), "SLURM_ARRAY_JOB_ID": "4711", "SLURM_GPUS_ON_NODE": "1"}
        assert slurm.sbatch(SCRIPTS["array"], words, **told).wait(120) == 0, slurm.printed()
        run = slurm.place / f"runs/sdtune/seed-{k}"
        assert f"seed: {k}\n" in (run / "config.yaml").read_text()
        learnt.append(load_file(run / "pytorch_lora_weights.safetensors"))
    assert slurm.printed().count("2 a process x 1 accumulated x 1 processes = 2 a step") == 2
    assert difference(*learnt) > 1e-6
    assert not slurm.requeued.exists()


@pytest.mark.fault(
    "Slurm warns before the time is over, or preempts",
    "The run saves, is queued again, and continues to the same bits.",
)
@pytest.mark.processes
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, slurm, places, uninterrupted):
    globals()[name](slurm, places, uninterrupted)


@pytest.mark.processes
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_bash(name):
    assert subprocess.run(["bash", "-n", SCRIPTS[name]]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", SCRIPTS[name]]).returncode == 0
