"""The run's folder: created or continued, never mixed with another run."""

import fcntl
import os
import re
import shlex
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from sdtune.config import fields, parsing, yaml_text
from sdtune.config.sections import MAY_CHANGE, Run, UserError
from sdtune.run import checkpoints, settings, status
from sdtune.run.artefacts import ARTEFACT, BEST, NEW, artefact, best, recorded, remove
from sdtune.run.files import sweep

OWN = (
    *("config.yaml", settings.METHOD, "metrics.jsonl", status.FILE, "report.html", "environment.json", "README.md"),
    "trace.json",
    "exit.json",  # of older runs
)
"""Files of a run besides its artefact. --overwrite removes them and OWN_FOLDERS."""
OWN_FOLDERS = ("checkpoints", "samples", "logs", "exports", BEST)
CLASS_IMAGES = "class-pictures"
"""Folder of a DreamBooth run with the class images that it generates."""
FIRST_LINE = "# sdtune "
"""The beginning of each config.yaml that a run writes: the command that continues it, as a comment."""
SHEET = re.compile(r"step-(\d{6,})\.png")
"""Names of the sample sheets that a run writes."""
INDEX = "model_index.json"
"""What makes a folder a model of diffusers, which is no run's before its artefact is written."""
BEGUN = ("metrics.jsonl", "checkpoints/*", "*.safetensors", ARTEFACT)
"""Files of which one exists once a run has reached its first step."""


def is_run(folder: Path) -> bool:
    """Whether an sdtune run wrote into this folder, or is about to."""
    traces = (".lock", "metrics.jsonl", "checkpoints", ARTEFACT)
    return (folder / "config.yaml").is_file() and any((folder / trace).exists() for trace in traces)


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
    os.register_at_fork(after_in_child=lock.close)  # loader workers may outlive a process that was killed
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
    refuse_foreign(out)
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
        command = " ".join(shlex.join([*words, "--config", str(written)]).splitlines())  # a name may hold a newline
        new.write_text(f"{FIRST_LINE}{command}\n{parsing.to_yaml(cfg)}")
        new.replace(written)
        settings.write(cfg, out)
        sweep(out)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None


def make_folders(out: Path) -> None:
    """Make the folder of the checkpoints, and check that the run's folders can be written to.

    Raises:
        UserError: one cannot; otherwise the run would fail at its first checkpoint.
    """
    for name in OWN_FOLDERS:
        try:
            if name == "checkpoints":
                (out / name).mkdir(exist_ok=True)
            elif not (out / name).exists():
                continue
            tempfile.TemporaryFile(dir=out / name).close()
        except OSError as error:
            raise UserError(f"--output-dir {out}: {name}: cannot be written ({error.strerror})") from None


def refuse_foreign(out: Path) -> None:
    """Refuse a folder in which files that a run would replace, or --overwrite remove, are not those of a run.

    Raises:
        UserError: names them.
    """
    with suppress(OSError):
        if (out / "config.yaml").read_bytes().startswith(FIRST_LINE.encode()):
            return
    if any((out / trace).exists() for trace in ("metrics.jsonl", "checkpoints", ARTEFACT)):
        return
    if found := [name for name in (*OWN, INDEX) if (out / name).exists()]:
        raise UserError(
            f"--output-dir {out}: {', '.join(found)} there was not written by a run, which would replace it; "
            "name another folder"
        )


FORMER_DEFAULTS = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
"""Defaults of earlier versions, which mean for the bases of their time what the default means now."""


def differences(cfg: Run, written: Path) -> list[str]:
    """The options that differ from those the run was started with and are not free to.

    An option that the file lacks is newer than the run, which behaved as its default does now. A run that was refused
    or stopped before its first step has nothing to protect, so no option differs.
    """
    if not any(any(written.parent.glob(trace)) for trace in BEGUN):
        return []
    before: dict[str, Any] = {"method": "lora"}  # older runs did not record it
    declared = type(cfg).model_fields
    before |= {name: declared[name].default for name in parsing.record(cfg).keys() & declared.keys()}
    try:
        before |= {name: value for name, value, _ in yaml_text.read_yaml(written)}
    except UserError as error:
        raise UserError(f"{error}; restore the file, or start anew with --overwrite") from None
    before |= {name: declared[name].default for name, was in FORMER_DEFAULTS.items() if before.get(name) == was}
    now = parsing.record(cfg)
    return [
        f"{name if name == 'method' else fields.flag(name)} was {before.get(name)}, is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in MAY_CHANGE and before.get(name) != now.get(name)
    ]


def discard(out: Path) -> None:
    """Remove a run from its folder, and no file that the run did not write."""
    remove(out, recorded(out)[1] if (out / ARTEFACT).exists() else artefact(out))
    checkpoints.sweep(out / "checkpoints")
    exports = [path for path in (out / "exports").glob("step-*") if checkpoints.NAME.fullmatch(path.name)]
    remove(out, sample_sheets(out))
    of_best = [out / BEST] if best(out) else []
    for folder in (*checkpoints.found(out / "checkpoints"), *exports, out / "logs", *of_best):
        shutil.rmtree(folder, ignore_errors=True)
    for name in OWN_FOLDERS:  # what the user put there stays
        with suppress(OSError):
            (out / name).rmdir()
    for stale in (*out.glob(".push-*"), out / NEW, out / f".{BEST}"):
        shutil.rmtree(stale, ignore_errors=True)
    for name in (*OWN, ARTEFACT):
        (out / name).unlink(missing_ok=True)


def own_entries(folder: Path) -> frozenset[str]:
    """Names of the files and folders, directly in ``folder``, that a run writes; empty if it is no run's folder.

    So a run's folder that lies in a folder of images, or is that folder, does not add its samples to the images.
    """
    if not is_run(folder):
        return frozenset()
    stages = (path.name for path in folder.glob(".push-*"))
    return frozenset((*OWN, *OWN_FOLDERS, CLASS_IMAGES, ARTEFACT, NEW, *stages))


def sample_sheets(out: Path) -> list[Path]:
    """The sample sheets that the run wrote, by step; a renamed or copied one is not among them."""
    return sorted((f for f in (out / "samples").glob("step-*.png") if SHEET.fullmatch(f.name)), key=step_of_sheet)


def step_of_sheet(sheet: Path) -> int:
    return int(sheet.stem.removeprefix("step-"))
