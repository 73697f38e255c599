"""One command on many processes: run it under accelerate's launcher, pass signals on, and say how it ended.

The settings of a launch are a file of accelerate's, as `accelerate config` writes it; some come with sdtune.
"""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sdtune.config import fields, parsing, shipped, yaml_text
from sdtune.config.sections import Launch, Run, UserError
from sdtune.config.untrusted import echo
from sdtune.training.launch_variables import check_environment

PRECISIONS = ("no", "fp16", "bf16")
TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""Values of an accelerate config's `distributed_type` under which sdtune trains."""
DEFAULT = "multi-gpu"
"""The shipped config of `--num-processes` alone."""


def launched() -> bool:
    """Whether a launcher (accelerate, torchrun, Slurm under a script) has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(words: list[str], cfg: Run, launch: Launch) -> int | None:
    """Launch ``sdtune WORDS`` on many processes if that is asked for.

    Returns:
        The exit code of the training; none if it is for this process to train.

    Raises:
        UserError: the launch options contradict each other, the config, the machine or the launcher.
    """
    check_environment()
    file = shipped.accelerate_file(launch.accelerate_config) if launch.accelerate_config else None
    if launched():
        join(cfg, file)
        return None
    if file is None and (launch.num_processes or 1) == 1:
        return None
    file = file or shipped.ready_made("accelerate")[f"accelerate/{DEFAULT}"]
    settings = placed(file, read(file, cfg, launch.num_processes))
    if settings["num_processes"] == 1 and settings["distributed_type"] != "FSDP":
        os.environ["ACCELERATE_MIXED_PRECISION"] = settings["mixed_precision"]
        return None
    return relaunch(words, cfg, launch, line(file, settings))


def processes_of(cfg: Run, launch: Launch) -> int:
    """How many processes the launch options ask for. Raises: UserError, as `start` does."""
    if not launch.accelerate_config:
        return launch.num_processes or 1
    file = shipped.accelerate_file(launch.accelerate_config)
    count: int = placed(file, read(file, cfg, launch.num_processes))["num_processes"]
    return count


def read(file: Path, cfg: Run, processes: int | None) -> dict[str, Any]:
    """An accelerate config, with the number of processes and the precision that follow from it and from the options.

    Raises:
        UserError: it is not for training here, or says something else than the options.
    """
    settings = {key: value for key, value, _ in yaml_text.read_yaml(file)}
    kind, where = str(settings.get("distributed_type", "NO")), f"--accelerate-config {file}"
    if kind == "DEEPSPEED" or settings.get("use_deepspeed"):
        raise UserError(f"{where}: sdtune does not train under DeepSpeed; use --accelerate-config fsdp2")
    if kind not in TYPES:
        raise UserError(f"{where}: distributed_type {kind}: sdtune trains under {', '.join(TYPES)}")
    for key in ("num_processes", "num_machines"):
        if not isinstance(settings.get(key) or 1, int):
            raise UserError(f"{where}: {key} wants a whole number, not {settings[key]!r}")
    own = settings.get("num_processes")
    own = None if own == -1 else own
    if processes and own and processes != own:
        raise UserError(f"--num-processes {processes}: {file} says num_processes: {own}; leave one of them out")
    precision = str(settings.get("mixed_precision") or "no")
    if precision not in PRECISIONS:
        raise UserError(f"{where}: mixed_precision {precision}: sdtune knows {', '.join(PRECISIONS)}")
    if cfg.mixed_precision and precision not in ("no", cfg.mixed_precision):
        raise UserError(
            f"--mixed-precision {cfg.mixed_precision}: {file} says mixed_precision: {precision}; leave one of them out"
        )
    machines = settings.get("num_machines") or 1
    count = processes or own or (1 if kind == "NO" else None)
    if machines > 1 and not (settings.get("main_process_ip") and settings.get("main_process_port")):
        raise UserError(
            f"{where}: num_machines: {machines} wants main_process_ip and main_process_port; "
            "`sdtune cp` copies a shipped file to edit, on each machine with its machine_rank"
        )
    if count and count % machines:
        raise UserError(f"{where}: {count} processes cannot be shared out among {machines} machines")
    chosen = cfg.mixed_precision or precision
    return settings | {
        "distributed_type": kind,
        "num_machines": machines,
        "num_processes": count,
        "mixed_precision": "no" if chosen == "fp8" else chosen,  # it is sdtune that computes in 8 bits
    }


def placed(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, once it is clear on what the processes train: a GPU each, or on a machine without GPUs the CPU.

    Raises:
        UserError: there are GPUs, but too few; or none, and it is for them to say how many processes.
    """
    import torch

    gpus, machines, count = torch.cuda.device_count(), settings["num_machines"], settings["num_processes"]
    if settings.get("use_cpu") or gpus == 0:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not on_cpu:
        os.environ.pop("ACCELERATE_USE_CPU", None)
    if count is None and on_cpu:
        raise UserError(f"{file} leaves the number of processes to the GPUs, and none is visible: add --num-processes")
    count = count or gpus * machines
    if not on_cpu and count > gpus * machines:
        raise UserError(
            f"--num-processes {count}: {gpus} GPUs are visible on each of {machines} machines; ask for fewer, or for "
            "the CPU with --accelerate-config cpu"
        )
    if not on_cpu and count < gpus * machines:
        echo(f"{gpus * machines} GPUs are visible, {count} are used", err=True)
    return settings | {"num_processes": count}


def line(file: Path, settings: Mapping[str, Any]) -> list[str]:
    """The options of `accelerate launch`, without the command that it is to launch."""
    count, machines = settings["num_processes"], settings["num_machines"]
    words = ["--config_file", str(file), "--num_machines", str(machines), "--num_processes", str(count)]
    words += ["--mixed_precision", settings["mixed_precision"]]
    if machines == 1 and not settings.get("main_process_port"):
        words += ["--main_process_port", "0"]  # a free one, so that two runs on a machine do not meet
    if settings["distributed_type"] in ("NO", "MULTI_CPU"):
        words += ["--multi_gpu"]  # the launcher of many processes; that of MULTI_CPU wants MPI
    if "OMP_NUM_THREADS" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        words += ["--num_cpu_threads_per_process", str(max(1, (os.cpu_count() or 1) * machines // count))]
    return words


def join(cfg: Run, file: Path | None) -> None:
    """Make a process that a launcher started ready to train: as an accelerate config says, if one is given.

    Raises:
        UserError: accelerate's launcher was given a config of its own, or the processes are not as many.
    """
    world = int(os.environ["WORLD_SIZE"])
    if file and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise UserError("--accelerate-config: accelerate launch takes it, as --config_file; leave it out here")
    if file:
        settings = read(file, cfg, None)
        if (settings["num_processes"] or world) != world:
            raise UserError(f"{file} says num_processes: {settings['num_processes']}; the launcher started {world}")
        settings = placed(file, settings | {"num_processes": world})
        alone = {"num_machines": 1, "main_process_port": None}  # the launcher has said where they meet
        os.environ.update(environment(file, settings | alone))
    elif world > 1:
        import torch

        if not torch.cuda.is_available():  # accelerate would train as many runs that know nothing of each other
            os.environ["ACCELERATE_USE_CPU"] = "true"


def environment(file: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """What `accelerate launch` would set in the environment of its processes.

    Raises:
        UserError: accelerate does not take the file.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    variables: dict[str, str]
    args = launch_command_parser().parse_args([*line(file, settings), "-m", "sdtune"])
    try:
        args, _, _ = _validate_launch_command(args)
        variables = launch.prepare_multi_gpu_env(args)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--accelerate-config {file}: {error}") from None
    return variables


def relaunch(words: list[str], cfg: Run, launch: Launch, line: list[str]) -> int:
    """Run ``accelerate launch LINE -m sdtune WORDS`` with the resolved config; the exit code of the training."""
    from sdtune.run import processes

    line = [*line, *command_of_processes(words, cfg, launch)]
    on_cpu = ["ACCELERATE_USE_CPU=true"] if "ACCELERATE_USE_CPU" in os.environ else []
    echo(shlex.join([*on_cpu, "accelerate", "launch", *line]), err=True)
    given = {"num_processes": launch.num_processes, "accelerate_config": launch.accelerate_config}
    options = [word for name, value in given.items() if value for word in (fields.flag(name), str(value))]
    resume_command = f"{parsing.same_command(cfg, ['sdtune', *words])} {shlex.join(options)}"
    os.environ[processes.RESUME_COMMAND] = resume_command
    received_signals: list[int] = []
    with passing_on(received_signals):
        codes = failures(line)
    if not codes:
        return 0
    followed = (processes.EXIT_PEER_DIED, -signal.SIGTERM)  # of those that ended because another did
    rank = next((rank for rank, code in codes.items() if code not in followed), min(codes))
    code, stopped = codes[rank], received_signals[:1]
    if stopped and code in (-stopped[0], 128 + stopped[0], -signal.SIGTERM):
        return 128 + stopped[0]
    if code < 0:
        count, name = line[line.index("--num_processes") + 1], signal.Signals(-code).name
        left = processes.describe_checkpoint(cfg.output_dir)
        what = f"process {rank} of {count} was killed by {name}; {left}; continue with: {resume_command}"
        echo(f"failed: {what}", err=True)
        return 1
    return 1 if code == processes.EXIT_PEER_DIED else code


def command_of_processes(words: list[str], cfg: Run, launch: Launch) -> list[str]:
    """The module and the options with which each process trains.

    The settings travel in a file, so that no secret stands in argv and no option clashes with the launcher's.
    """
    real = cfg.model_dump(mode="json")
    if signed := [name for name, value in parsing.plain(cfg).items() if value != real[name]]:
        raise UserError(
            f"{fields.flag(signed[0])}: its address holds a secret, which would have to be written to a file for "
            "several processes to read; train on one process, or download the data"
        )
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    resolved = cfg.output_dir / ".launch.yaml"
    new = resolved.with_name(f".launch-{os.getpid()}.yaml")
    new.write_text(parsing.to_yaml(cfg), encoding="utf-8")
    new.replace(resolved)  # at once, as other machines may do the same
    flags = [fields.flag(name) for name in ("overwrite", "allow_change") if getattr(launch, name)]
    return ["-m", "sdtune", *words, "--config", str(resolved), *flags]


def failures(line: list[str]) -> dict[int, int]:
    """Run ``accelerate launch LINE`` to its end; the exit code by rank of the processes that failed.

    Raises:
        UserError: accelerate does not take the line.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(line)
    args.signals_to_handle = "SIGHUP,SIGQUIT"  # the others are passed on here, and a save may take as long as it does
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except (ValueError, TypeError, ImportError, ConnectionError) as error:  # of accelerate, before anything starts
        raise UserError(f"--accelerate-config {line[1]}: {error}") from None
    finally:
        for child in children():
            child.kill()
    return {}


def children() -> list[Any]:
    """The processes that the launcher has started in this one."""
    import psutil

    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def passing_on(received_signals: list[int]) -> Iterator[None]:
    """Context in which signals that ask to stop go to the processes of the run, and to ``received_signals``."""
    from sdtune.run.signals import STOP

    def note(number: int, _: FrameType | None) -> None:
        received_signals.append(number)
        if not (running := children()):
            sys.exit(128 + number)
        for child in running:
            child.send_signal(number)

    before = {number: signal.signal(number, note) for number in STOP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
