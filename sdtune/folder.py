"""The run's folder: made or continued, never mixed up with another run's."""

import fcntl
import os
import shlex
import shutil
from pathlib import Path
from typing import IO, Any

import yaml

from sdtune import options
from sdtune.configs import Run, UserError
from sdtune.methods import MAY_CHANGE

OWN = ("config.yaml", "metrics.jsonl", "report.html", "environment.json", "README.md", "exit.json")
"""Files of a run besides its artefact; with OWN_FOLDERS, what --overwrite discards."""
OWN_FOLDERS = ("checkpoints", "samples", "logs")


def open_run(cfg: Run, words: list[str], overwrite: bool, allow_change: bool) -> IO[str]:
    """Create ``cfg.output_dir``, or make sure that the run in it is this one.

    Returns:
        The lock file, which holds the run for this process as long as it is open.

    Raises:
        UserError: the folder cannot be written, another process trains in it, or its config differs.
    """
    out = cfg.output_dir
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except NotADirectoryError:
        raise UserError(f"--output-dir {out}: is a file or lies under one") from None
    except FileExistsError:
        raise UserError(f"--output-dir {out}: is a file") from None
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output-dir {out}: another process is training there") from None
    written = out / "config.yaml"
    if overwrite:
        discard(out)
    elif written.exists() and not allow_change and (changed := differences(cfg, written)):
        raise UserError(
            f"--output-dir {out}: holds a run with another config:\n       "
            + "\n       ".join(changed)
            + "\n       name another folder, start anew with --overwrite, or continue with --allow-change"
        )
    new = out / f".config-{os.getpid()}.yaml"
    try:
        new.write_text(f"# {shlex.join(['sdtune', *words, '--config', str(written)])}\n{options.to_yaml(cfg)}")
        new.replace(written)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None
    return lock


def differences(cfg: Run, written: Path) -> list[str]:
    """The options that differ from those the run was started with and are not free to."""
    before: dict[str, Any] = yaml.safe_load(written.read_text(encoding="utf-8")) or {}
    now = options.plain(cfg)
    return [
        f"{options.flag(name)} was {before.get(name)}, is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in MAY_CHANGE and before.get(name) != now.get(name)
    ]


def discard(out: Path) -> None:
    """Remove a run from its folder, and nothing that a run does not write."""
    for name in OWN_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for stale in out.glob(".push-*"):
        shutil.rmtree(stale, ignore_errors=True)
    for file in (*(out / name for name in OWN), *out.glob("*.safetensors")):
        file.unlink(missing_ok=True)
