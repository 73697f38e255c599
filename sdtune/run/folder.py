"""The run's folder: made or continued, never mixed up with another run's; and which of its files are the artefact."""

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import yaml
from safetensors import SafetensorError

from sdtune.config import parsing
from sdtune.config.methods import MAY_CHANGE, LoraConfig
from sdtune.config.sections import Run, RunFailed, UserError
from sdtune.run import settings

OWN = ("config.yaml", settings.METHOD, "metrics.jsonl", "report.html", "environment.json", "README.md", "exit.json")
"""Files of a run besides its artefact; with OWN_FOLDERS, what --overwrite discards."""
OWN_FOLDERS = ("checkpoints", "samples", "logs", "exports")
NEW = ".new"
"""Where, within the folder that it is meant for, an artefact of several parts is written first."""
ARTEFACT = "artefact.json"
"""The step that the artefact is of, and its files: none, or all of them, as this is written last."""
BEGUN = ("metrics.jsonl", "checkpoints/*", "*.safetensors", ARTEFACT)
"""What there is of a run that has come as far as its first step."""


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
    os.register_at_fork(after_in_child=lock.close)  # readers of images may outlive a process that was killed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output-dir {out}: another process is training there") from None
    try:
        begin(cfg, words, overwrite, allow_change)
    except BaseException:
        lock.close()
        raise
    return lock


def begin(cfg: Run, words: list[str], overwrite: bool, allow_change: bool) -> None:
    """Make sure that the run in the locked folder is this one, and write its config."""
    out = cfg.output_dir
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
        new.write_text(f"# {shlex.join(['sdtune', *words, '--config', str(written)])}\n{parsing.to_yaml(cfg)}")
        new.replace(written)
        settings.write(cfg, out)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None


def differences(cfg: Run, written: Path) -> list[str]:
    """The options that differ from those the run was started with and are not free to.

    One that is not written down is of a later version than the run, which had what is its default now. A run that was
    refused, or stopped, before its first step is in nobody's way.
    """
    if not any(any(written.parent.glob(trace)) for trace in BEGUN):
        return []
    before: dict[str, Any] = {"method": LoraConfig.method}  # runs of a time when it was not written down
    fields = type(cfg).model_fields
    before |= {name: fields[name].default for name in parsing.record(cfg).keys() & fields.keys()}
    before |= yaml.safe_load(written.read_text(encoding="utf-8")) or {}
    now = parsing.record(cfg)
    return [
        f"{name if name == 'method' else parsing.flag(name)} was {before.get(name)}, is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in MAY_CHANGE and before.get(name) != now.get(name)
    ]


def discard(out: Path) -> None:
    """Remove a run from its folder, and nothing that a run does not write."""
    remove(out, recorded(out)[1] if (out / ARTEFACT).exists() else artefact(out))
    for name in OWN_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for stale in (*out.glob(".push-*"), out / NEW):
        shutil.rmtree(stale, ignore_errors=True)
    for name in (*OWN, ARTEFACT):
        (out / name).unlink(missing_ok=True)


# ---- the artefact ------------------------------------------------------------------------------------


def artefact(out: Path, step: int | None = None) -> list[Path]:
    """The files of a run that diffusers loads; none unless all of them are there, and are of ``step`` if that is given.

    Raises:
        UserError: its record is damaged.
    """
    if (out / ARTEFACT).exists():
        of, files = recorded(out)
        whole = of is not None and step in (None, of) and all(file.is_file() for file in files)
        return files if whole else []
    config = out / "config.yaml"
    if step is not None or not config.is_file() or "method" in (yaml.safe_load(config.read_text("utf-8")) or {}):
        return []
    return sorted(out.glob("*.safetensors"))  # a run of a time when neither record nor method was written


def recorded(out: Path) -> tuple[int | None, list[Path]]:
    """The step of the artefact, none while it is being written, and its files."""
    try:
        told = json.loads((out / ARTEFACT).read_text(encoding="utf-8"))
        step, names = told["step"], [PurePosixPath(name) for name in told["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / ARTEFACT}: is damaged ({error}); remove it and train again, or mend it") from None
    if strange := [name for name in names if name.is_absolute() or ".." in name.parts]:
        raise UserError(f"{out / ARTEFACT}: {strange[0]} is no file of this run")
    return step, [out / name for name in names]


def record(out: Path, step: int | None, files: Iterable[Path]) -> None:
    names = sorted(by_path(out, files))
    new = out / f".{ARTEFACT}"
    new.write_text(json.dumps({"step": step, "files": names}, indent=1) + "\n", encoding="utf-8")
    new.replace(out / ARTEFACT)


def by_path(out: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Files by their path in ``out``."""
    return {file.relative_to(out).as_posix(): file for file in files}


def entries(out: Path, files: Iterable[Path]) -> list[str]:
    """Names of the files and folders right in ``out`` that hold ``files``."""
    return list(dict.fromkeys(file.relative_to(out).parts[0] for file in files))


def remove(out: Path, files: Iterable[Path]) -> None:
    """Remove files below ``out``, and the folders that this leaves empty."""
    for file in files:
        file.unlink(missing_ok=True)
        for folder in file.parents:
            if folder == out or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()


def export(recipe: Any, out: Path) -> list[Path]:
    """Write the artefact of the weights as they are to ``out``; its files. See ``State.complete``."""
    recipe.eval()
    try:
        return [Path(file) for file in recipe.export(out)]
    finally:
        recipe.train()


def export_last(recipe: Any, out: Path, step: int) -> list[Path]:
    """Write the artefact of a run that has ended, in place of an older one, and record which files it is."""
    before = recorded(out)[1] if (out / ARTEFACT).exists() else []
    with failing_on_a_full_disk(out):
        record(out, None, before)
        files = export(recipe, out)
        remove(out, sorted(set(before) - set(files)))
        record(out, step, files)
    return files


def export_copy(recipe: Any, out: Path, step: int) -> None:
    """Write the artefact as it is now to ``exports/step-000500``, whole or not at all."""
    final = out / "exports" / f"step-{step:06d}"
    new = final.with_name(f".{final.name}")
    with failing_on_a_full_disk(final):
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            export(recipe, new)
            shutil.rmtree(final, ignore_errors=True)  # of a run that was killed after it and continued from before
            new.rename(final)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def failing_on_a_full_disk(place: Path) -> Iterator[None]:
    """Say what failed when a disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{place}: the artefact cannot be written ({error}); make room, then give the same command again"
        ) from error
