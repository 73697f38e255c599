"""Many processes: the accelerate configs that come with sdtune, two machines, a failure of one that ends them all."""

import json
import os
import random
import signal
import socket
from functools import partial
from threading import Event

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import run as torchrun

from sdtune.cli import main
from sdtune.config import fields, shipped
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.data import cache
from sdtune.run import artefacts, checkpoints, metrics, processes
from sdtune.training import launch, launch_variables
from tests import ranks
from tests.compare import assert_same_bits, difference, mean_difference
from tests.conftest import LONG, command, status
from tests.contract import RECIPES
from tests.ranks import reached, wait_until

SHIPPED = {name.partition("/")[2]: path for name, path in shipped.ready_made("accelerate").items()}
EXPECTED = {
    "multi-gpu": {},
    "multi-node": {},
    "cpu": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    "fp16": {},
    "bf16": {},
}
"""What accelerate tells the processes under each."""


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
    own = name if name in launch.PRECISIONS else None
    assert load_config_from_file(str(SHIPPED[name])).mixed_precision == own  # else the run's decides
    if own and precision != own:
        if precision != "no":
            with pytest.raises(UserError, match=f"--mixed-precision {precision}: .*; leave one of them out"):
                launch.read(edited(name), config(mixed_precision=precision), 2)
        return
    settings = launch.read(edited(name, num_processes=4), config(mixed_precision=precision), None)
    told = launch.environment(edited(name, num_processes=4), settings)
    assert EXPECTED[name].items() <= told.items()
    assert told["ACCELERATE_MIXED_PRECISION"] == precision
    assert ("ACCELERATE_USE_FSDP" in told) is (name == "fsdp2")


@pytest.mark.processes
@pytest.mark.parametrize("name", ["cpu", "multi-node", "fsdp2", "fp16"])  # multi-gpu and bf16 are fp16 by other words
def test_shipped_config_trains_on_the_cpu_to_the_weights_of_one_process(name, places, shared, tmp_path, edited):
    learnt = RECIPES["lora"].artefact
    small = ["--learning-rate", "1e-4", "--steps", "3"]
    file = edited(name, num_processes=2)
    cut = ["--train-batch-size", "1", "--accelerate-config", str(file)]
    ranks.train(2, command(*places[:2], tmp_path / "two", *small, *cut), tmp_path / "output")
    said = (tmp_path / "output" / "0.out").read_text()
    assert ("(FSDP2)" in said) is (name == "fsdp2")
    half = ["--mixed-precision", name] if name in launch.PRECISIONS else []
    alone, together = learnt(shared("lora", *small, *half)), learnt(tmp_path / "two")
    if half:  # Adam moves a number whose gradient is all rounding by the learning rate, either way
        assert difference(alone, together) < 3 * 1e-4
        assert mean_difference(alone, together) < 1e-6
    else:
        assert difference(alone, together) < 1e-6


WAYS = {
    "config": ("fp16", ["--config", "{run}"], None),
    "accelerate config file": ("bf16", ["--accelerate-config", "{file}"], None),
    "accelerate launch": ("bf16", [], ["--mixed_precision", "{}"]),
    "accelerate launch with a config file": ("fp16", [], ["--config_file", "{file}"]),
}
"""How a precision can be asked for, besides its flag: options of the run, and of the launcher."""


@pytest.mark.processes
@pytest.mark.parametrize("way", WAYS)
def test_a_precision_is_the_same_however_it_is_asked_for(way, shared, places, tmp_path, edited, python):
    precision, own, launcher = WAYS[way]
    (tmp_path / "run.yaml").write_text(f"mixed_precision: {precision}\n")
    told = {"run": tmp_path / "run.yaml", "file": edited(precision, num_processes=1, distributed_type="NO")}
    words = command(*places[:2], tmp_path / "asked", "--steps", "2", *(word.format(precision, **told) for word in own))
    if launcher is None:
        started = ranks.Forked(partial(main, words), tmp_path / "output")
    else:
        line = [word.format(precision, **told) for word in launcher]
        line += ["--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no", "--cpu"]
        started = ranks.Forked(partial(accelerate_launch, *line, "-m", "sdtune", *words), tmp_path / "output", python)
    assert started.exit_code() == 0, started.output("err")
    saved = json.loads((checkpoints.found(tmp_path / "asked" / "checkpoints")[-1] / "state.json").read_text())
    assert (saved["scaler"] is not None) is (precision == "fp16")
    learnt = RECIPES["lora"].artefact
    asked = learnt(tmp_path / "asked")
    assert difference(learnt(shared("lora", "--steps", "2", "--mixed-precision", precision)), asked) == 0
    assert {t.dtype.itemsize for t in asked.values()} == {4}


@pytest.mark.parametrize(
    ("lines", "flags", "processes", "told"),
    [
        ({"num_processes": 4}, {}, 2, "--num-processes 2: {file} says num_processes: 4; leave one of them out"),
        ({"mixed_precision": "fp16"}, {"mixed_precision": "bf16"}, 2, "--mixed-precision bf16: {file} says"),
        ({"mixed_precision": "fp8"}, {}, 2, "mixed_precision fp8: sdtune knows no, fp16, bf16"),
        ({"distributed_type": "MEGATRON_LM"}, {}, 2, "distributed_type MEGATRON_LM: sdtune trains under NO,"),
        (
            {"distributed_type": "DEEPSPEED"},
            {},
            2,
            "sdtune does not train under DeepSpeed; use --accelerate-config fsdp2",
        ),
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
    words += [word for name, value in flags.items() for word in (fields.flag(name), value)]
    words += ["--num-processes", str(processes)] if processes else []
    assert status(words) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert told.format(file=file) in said
    assert "Traceback" not in said


@pytest.mark.fault("Variables of another launcher are in the environment", "Refused, with the variable's name.")
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set in the environment, but RANK and WORLD_SIZE and MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set in the environment, but MASTER_ADDR and MASTER_PORT are not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment, but RANK and"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK=: this variable of the environment has no usable value"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK=x: this variable of the environment has no usable value"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 is no number of one of WORLD_SIZE=1 processes"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM of the environment: Megatron"),
        ({"ACCELERATE_DYNAMO_BACKEND": "zap"}, "ACCELERATE_DYNAMO_BACKEND of the environment: 'ZAP' is not a valid"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU of the environment: invalid truth value maybe"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true: weights are cut into slices by version 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true: sdtune does not train under DeepSpeed"),
    ],
)
def test_variables_that_another_launcher_left_behind_are_named(variables, told, monkeypatch, tmp_path, capfd):
    for name in (*launch_variables.NUMBERS, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert status(["lora", "--dataset", "d", "--output-dir", str(tmp_path / "run")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert told in line
    assert not list((tmp_path / "run").rglob("config.yaml"))


def test_a_launchers_own_variables_pass(monkeypatch):
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    launch_variables.check_environment()


def test_too_few_gpus_are_no_reason_to_train_on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    settings = launch.read(SHIPPED["multi-gpu"], config(), 2)
    with pytest.raises(UserError, match="1 GPUs are visible on each of 1 machines"):
        launch.placed(SHIPPED["multi-gpu"], settings)
    assert launch.placed(SHIPPED["multi-gpu"], settings | {"num_processes": None})["num_processes"] == 1
    two = launch.read(SHIPPED["cpu"], config(), None)
    assert launch.placed(SHIPPED["cpu"], two)["num_processes"] == 2
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.processes
def test_launcher_that_started_another_number_of_processes(places, tmp_path, edited):
    file = edited("multi-gpu", num_processes=3)
    started = ranks.Ranks(
        2, command(*places[:2], tmp_path / "run", "--accelerate-config", str(file)), tmp_path / "output"
    )
    assert started.exit_codes() == [2, 2]
    assert f"{file} says num_processes: 3; the launcher started 2" in started.output("err")


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


def accelerate_launch(*words: str) -> None:
    launch_command(launch_command_parser().parse_args(words))


def worker(launcher: ranks.Forked, rank: int) -> psutil.Process:
    running = psutil.Process(launcher.process.pid).children()
    return next(p for p in running if p.environ().get("RANK") == str(rank))


@pytest.mark.fault(
    "One of several processes fails", "Its error is shown once, the others end, the last checkpoint is whole."
)
@pytest.mark.processes
def test_error_of_one_process_is_told_once_and_ends_the_others(places, tmp_path):
    file = tmp_path / "fails.py"
    file.write_text(FAILS)
    words = ["run", str(file), *command(*places[:2], tmp_path / "run", *LONG)[1:]]
    started = ranks.Ranks(3, words, tmp_path / "output")
    codes = started.exit_codes()
    assert codes == [processes.EXIT_PEER_DIED, 1, processes.EXIT_PEER_DIED]
    told = started.output("err")
    assert told.count("ZeroDivisionError: the seventh batch of process 1") == 1
    assert told.count("failed: process 1 of 3: ZeroDivisionError; the last checkpoint, step-000005, is complete; ") == 1
    assert "closed by peer" not in told
    assert "without a message" not in told
    (saved,) = checkpoints.found(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-000005" and checkpoints.verify(saved) is None


@pytest.mark.fault(
    "One of several processes is killed",
    "It is named within seconds, the others end, and the same command continues to the same bits.",
)
@pytest.mark.processes
def test_killed_process_is_named_and_the_same_command_continues_to_the_same_bits(
    uninterrupted, places, tmp_path, python
):
    """On one machine, under `sdtune` itself, at a step that is another each time."""
    cut = tmp_path / "cut"
    words = command(*places[:2], cut, *LONG, "--num-processes", "2")
    launcher = ranks.Forked(partial(main, words), tmp_path / "launcher", python)
    rank, step = random.randrange(2), random.randrange(6, 12)
    wait_until(lambda: reached(cut, step), launcher)
    worker(launcher, rank).send_signal(signal.SIGKILL)
    assert launcher.exit_code(30) == 1
    said = launcher.output("err")
    told = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert len(told) == 1, said
    last = checkpoints.found(cut / "checkpoints")[-1].name
    assert told[0].startswith(
        f"failed: process {rank} of 2 was killed by SIGKILL; the last checkpoint, {last}, is complete; "
    )
    assert told[0].endswith("--num-processes 2") and f"continue with: sdtune lora --output-dir {cut}" in told[0]
    assert "Traceback" not in said and "[c10d]" not in said
    ranks.train(2, words, tmp_path / "output")
    assert_same_bits(uninterrupted, cut)


@pytest.mark.fault("One of several processes hangs", "It is named after `--ddp-timeout`.")
@pytest.mark.processes
def test_process_that_hangs_is_named_after_the_time_out(places, tmp_path):
    out = tmp_path / "run"
    started = ranks.Ranks(2, command(*places[:2], out, *LONG, "--ddp-timeout", "3"), tmp_path / "output")
    wait_until(lambda: reached(out, 6))
    os.kill(started.all[1].process.pid, signal.SIGSTOP)
    assert started.all[0].exit_code() == 1
    assert "failed: process 1 of 2 did not answer for 3 s (--ddp-timeout)" in started.output("err")
    assert started.all[1].exit_code(0) == -signal.SIGKILL
    assert checkpoints.found(out / "checkpoints")


@pytest.mark.processes
def test_one_process_may_work_alone_for_longer_than_a_collective_waits(places, tmp_path, monkeypatch):
    """Checkpoints, copies of the artefact, sample grids of the first process; a share of the cache of another."""
    alone, patience = [], 2

    def slow(module, name, rank):
        real = getattr(module, name)

        def work(*args, **kwargs):
            if os.environ["RANK"] == rank:
                Event().wait(2 * patience)
                print(f"{name} took its time")
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, work)
        alone.append(name)

    slow(checkpoints, "save", "0")
    slow(artefacts, "export_copy", "0")
    slow(metrics, "save_sheet", "0")
    slow(cache, "write_tensors", "1")
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    options = ["--steps", "2", "--export-steps", "2", "--num-validation-images", "1", "--train-batch-size", "1"]
    words = command(*places[:2], tmp_path / "run", *options, "--validation-inference-steps", "1")
    started = ranks.Ranks(2, [*words, "--ddp-timeout", str(patience)], tmp_path / "output")
    assert started.exit_codes() == [0, 0], started.output("err")
    assert all(f"{name} took its time" in started.output("out") for name in alone)


@pytest.mark.fault("A signal reaches one of several processes", "All save together and end.")
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_to_one_process_saves_and_ends_all(number, places, tmp_path):
    out = tmp_path / "run"
    words = command(*places[:2], out, *LONG, "--checkpointing-steps", "0")
    started = ranks.Ranks(2, words, tmp_path / "output")
    wait_until(lambda: reached(out, 3))
    os.kill(started.all[1].process.pid, number)
    assert started.exit_codes() == [128 + number] * 2
    assert "and saved; continue with: sdtune lora" in started.output("out")
    assert started.output("out").rstrip().endswith("under the same launcher")
    assert len(checkpoints.found(out / "checkpoints")) == 1


# ---- several machines, other launchers -----------------------------------------------------------------


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.mark.fault(
    "A process of another machine is lost", "It is named; the run continues under another launcher to the same bits."
)
@pytest.mark.processes
def test_two_machines_under_accelerate_lose_a_process_and_go_on_under_torchrun(uninterrupted, places, tmp_path, python):
    """Each a launcher with one process, on this host."""
    cut = tmp_path / "cut"
    words, cpu = ["sdtune", *command(*places[:2], cut, *LONG)], {"ACCELERATE_USE_CPU": "true"}

    line = ["--num_machines", "2", "--num_processes", "2", "--multi_gpu", "--dynamo_backend", "no"]
    line += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--mixed_precision", "no"]
    machines = [
        ranks.Forked(
            partial(accelerate_launch, *line, "--machine_rank", str(k), "-m", *words), tmp_path / f"{k}", python, **cpu
        )
        for k in range(2)
    ]
    wait_until(lambda: reached(cut, 8), *machines)
    worker(machines[1], 1).send_signal(signal.SIGKILL)
    assert 0 not in [machine.exit_code(60) for machine in machines]
    said = machines[0].output("err")
    assert said.count("failed: process 1 of 2 died without a message") == 1
    assert said.count("under the same launcher") == 1

    line = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    machines = [
        ranks.Forked(
            partial(torchrun.main, [*line, "--node-rank", str(k), "-m", "--", *words]), tmp_path / f"{k}", python, **cpu
        )
        for k in range(2)
    ]
    assert [machine.exit_code() for machine in machines] == [0, 0], machines[0].output("err")
    assert "continuing at step" in machines[0].output("out")
    assert_same_bits(uninterrupted, cut)
