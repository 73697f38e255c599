"""Many processes: the accelerate configs that come with sdtune, two machines, a failure of one that ends them all."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from sdtune import checkpoints, launch, options, peers
from sdtune.configs import UserError
from sdtune.methods import LoraConfig
from tests import ranks
from tests.conftest import command, status
from tests.contract import RECIPES
from tests.test_cuts import difference
from tests.test_resume import assert_same_bits

SHIPPED = {name.partition("/")[2]: path for name, path in options.ready_made("accelerate").items()}
EXPECTED = {
    "multi-gpu": {},
    "multi-node": {},
    "cpu": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
"""What accelerate tells the processes under each."""
ON_CPU = [name for name in EXPECTED if not name.startswith("zero")]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What a launch puts into the environment stays in its test."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        yield


@pytest.fixture
def edited(tmp_path):
    """A shipped accelerate config with other lines; one for several machines gets an address in any case."""

    def edit(name, **lines):
        settings = yaml.safe_load(SHIPPED[name].read_text()) | lines
        if settings["num_machines"] > 1:
            settings |= {"main_process_ip": "127.0.0.1"}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    return edit


def config(**given):
    return LoraConfig(dataset="d", **given)


# ---- accelerate's files --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_takes_every_shipped_config_in_every_precision(name, precision, edited):
    assert load_config_from_file(str(SHIPPED[name])).mixed_precision is None  # the run's decides
    settings = launch.read(edited(name, num_processes=4), config(mixed_precision=precision), None)
    told = launch.environment(edited(name, num_processes=4), settings)
    assert EXPECTED[name].items() <= told.items()
    assert told["ACCELERATE_MIXED_PRECISION"] == precision
    both = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"}
    assert both & told.keys() == both & EXPECTED[name].keys()


@pytest.mark.parametrize("name", ON_CPU)
def test_shipped_config_trains_on_the_cpu_to_the_weights_of_one_process(name, places, lora, tmp_path, edited):
    learnt = RECIPES["lora"].artefact
    small = ["--learning-rate", "1e-4", "--steps", "3"]
    file = edited(name, num_processes=2)
    cut = ["--train-batch-size", "1", "--accelerate-config", str(file)]
    ranks.trained(2, command(*places, tmp_path / "two", *small, *cut), tmp_path / "said")
    assert difference(learnt(lora("one", *small)), learnt(tmp_path / "two")) < 1e-6


@pytest.mark.parametrize("name", set(SHIPPED) - set(ON_CPU))
def test_what_needs_gpus_says_so(name, sd, pictures, tmp_path, capfd):
    words = command(sd, pictures, tmp_path / "run", "--accelerate-config", name, "--num-processes", "2")
    assert status(words) == 2
    assert "DeepSpeed wants a GPU for each process" in capfd.readouterr().err
    started = ranks.Ranks(2, words[:-2], tmp_path / "said")
    assert started.codes() == [2, 2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "flags", "processes", "told"),
    [
        ({"num_processes": 4}, {}, 2, "--num-processes 2: {file} says num_processes: 4; leave one of them out"),
        ({"mixed_precision": "fp16"}, {"mixed_precision": "bf16"}, 2, "--mixed-precision bf16: {file} says"),
        ({"mixed_precision": "fp8"}, {}, 2, "mixed_precision fp8: sdtune knows no, fp16, bf16"),
        ({"distributed_type": "MEGATRON_LM"}, {}, 2, "distributed_type MEGATRON_LM: sdtune trains under NO,"),
        ({"num_processes": "two"}, {}, None, "num_processes wants a whole number, not 'two'"),
        ({"num_machines": 2, "main_process_ip": None}, {}, 2, "num_machines: 2 wants main_process_ip and"),
        ({"num_machines": 2, "main_process_ip": "a", "main_process_port": 1}, {}, 3, "3 processes cannot be shared"),
        ({}, {}, None, "{file} leaves the number of processes to the GPUs, and none is visible: add --num-processes"),
        ({"num_prosesses": 2}, {}, 2, "unknown keys (['num_prosesses'])"),
    ],
)
def test_contradictions_are_refused(lines, flags, processes, told, tmp_path, sd, pictures, capfd):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU"} | lines))
    words = command(sd, pictures, tmp_path / "run", "--accelerate-config", str(file))
    words += [word for name, value in flags.items() for word in (options.flag(name), value)]
    words += ["--num-processes", str(processes)] if processes else []
    assert status(words) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert told.format(file=file) in said
    assert "Traceback" not in said


def test_too_few_gpus_are_no_reason_to_train_on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    settings = launch.read(SHIPPED["multi-gpu"], config(), 2)
    with pytest.raises(UserError, match="1 GPUs are visible on each of 1 machines"):
        launch.placed(SHIPPED["multi-gpu"], settings)
    assert launch.placed(SHIPPED["multi-gpu"], settings | {"num_processes": None})["num_processes"] == 1
    two = launch.read(SHIPPED["cpu"], config(), None)
    assert launch.placed(SHIPPED["cpu"], two)["num_processes"] == 2
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_launcher_that_started_another_number_of_processes(places, tmp_path, edited):
    file = edited("multi-gpu", num_processes=3)
    started = ranks.Ranks(2, command(*places, tmp_path / "run", "--accelerate-config", str(file)), tmp_path / "said")
    assert started.codes() == [2, 2]
    assert f"{file} says num_processes: 3; the launcher started 2" in started.said("err")


# ---- when a process fails ------------------------------------------------------------------------------

FAILS = """
import os
from sdtune.recipes.lora import Lora

class Fails(Lora):
    '''LoRA that fails in one process.'''

    def forward(self, batch):
        self.seen = getattr(self, "seen", 0) + 1
        if os.environ["RANK"] == "1" and self.seen == 7:
            raise ZeroDivisionError("the seventh batch of process 1")
        return super().forward(batch)
"""
LONG = ["--steps", "60", "--checkpointing-steps", "5", "--log-steps", "1", "--train-batch-size", "1"]


def reached(out: Path, lines: int) -> bool:
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= lines


def wait_until(holds, *running):
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in running), "it ended before it could be interrupted"
        time.sleep(0.005)


def start(words, **environment) -> subprocess.Popen:
    argv = [sys.executable, "-m", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, **pipes)


def worker(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    running = psutil.Process(launcher.pid).children()
    return next(p for p in running if p.environ().get("RANK") == str(rank))


def test_error_of_one_process_is_told_once_and_ends_the_others(places, tmp_path):
    file = tmp_path / "fails.py"
    file.write_text(FAILS)
    words = ["run", str(file), *command(*places, tmp_path / "run", *LONG)[1:]]
    started = ranks.Ranks(3, words, tmp_path / "said")
    codes = started.codes()
    assert codes == [peers.GONE, 1, peers.GONE]
    told = started.said("err")
    assert told.count("ZeroDivisionError: the seventh batch of process 1") == 1
    assert "closed by peer" not in told
    assert "without a word" not in told
    (saved,) = checkpoints.found(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-000005" and checkpoints.verify(saved) is None


def test_killed_process_is_named_and_the_same_command_continues_to_the_same_bits(places, tmp_path, capfd):
    """On one machine, under `sdtune` itself, at a step that is another each time."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ranks.trained(2, command(*places, whole, *LONG), tmp_path / "said")
    words = command(*places, cut, *LONG, "--num-processes", "2")
    launcher = start(["sdtune", *words])
    wait_until(lambda: reached(cut, random.randrange(6, 30)), launcher)
    rank = random.randrange(2)
    worker(launcher, rank).send_signal(signal.SIGKILL)
    _, said = launcher.communicate(timeout=30)
    assert launcher.returncode == 1
    told = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert len(told) == 1, said
    assert told[0].startswith(f"failed: process {rank} of 2 was killed by SIGKILL; the last checkpoint is whole; ")
    assert told[0].endswith("--num-processes 2") and f"continue with: sdtune lora --output-dir {cut}" in told[0]
    assert "Traceback" not in said
    ranks.trained(2, words, tmp_path / "said")
    assert_same_bits(whole, cut)


def test_process_that_hangs_is_named_after_the_time_out(places, tmp_path):
    out = tmp_path / "run"
    started = ranks.Ranks(2, command(*places, out, *LONG, "--ddp-timeout", "3"), tmp_path / "said")
    wait_until(lambda: reached(out, 6))
    os.kill(started.processes[1].pid, signal.SIGSTOP)
    started.processes[0].join(30)
    assert started.processes[0].exitcode == 1
    assert "failed: process 1 of 2 did not answer for 3 s (--ddp-timeout)" in started.said("err")
    started.processes[1].kill()
    assert checkpoints.found(out / "checkpoints")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_to_one_process_saves_and_ends_all(number, places, tmp_path):
    out = tmp_path / "run"
    words = command(*places, out, *LONG, "--checkpointing-steps", "0")
    started = ranks.Ranks(2, words, tmp_path / "said")
    wait_until(lambda: reached(out, 3))
    os.kill(started.processes[1].pid, number)
    assert started.codes() == [128 + number] * 2
    assert "and saved; continue with: sdtune lora" in started.said("out")
    assert started.said("out").rstrip().endswith("under the same launcher")
    assert len(checkpoints.found(out / "checkpoints")) == 1


# ---- several machines, other launchers -----------------------------------------------------------------


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_two_machines_under_accelerate_lose_a_process_and_go_on_under_torchrun(places, tmp_path):
    """Each a launcher with one process, on this host."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ranks.trained(2, command(*places, whole, *LONG), tmp_path / "said")
    words, cpu = ["sdtune", *command(*places, cut, *LONG)], {"ACCELERATE_USE_CPU": "true"}

    port = free_port()
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--mixed_precision", "no"]
    place += ["--num_machines", "2", "--num_processes", "2", "--multi_gpu", "--dynamo_backend", "no", "-m"]
    line = ["accelerate.commands.launch", "--machine_rank"]
    machines = [start([*line, str(rank), *place, *words], **cpu) for rank in range(2)]
    wait_until(lambda: reached(cut, 8), *machines)
    worker(machines[1], 1).send_signal(signal.SIGKILL)
    said = [machine.communicate(timeout=60)[1] for machine in machines]
    assert all(machine.returncode != 0 for machine in machines)
    assert said[0].count("failed: process 1 of 2 has ended without a word") == 1
    assert "under the same launcher" in said[0]

    port = free_port()
    line = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    line += ["--master-port", port, "--node-rank"]
    machines = [start([*line, str(rank), "-m", "--", *words], **cpu) for rank in range(2)]
    said = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "continuing at step" in said[0][0]
    assert_same_bits(whole, cut)
