"""The run's folder: created or continued, never mixed with another run; and which of its files are the artefact."""

import fcntl
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from safetensors import SafetensorError

from sdtune.config import fields, parsing, yaml_text
from sdtune.config.sections import MAY_CHANGE, Run, RunFailed, UserError
from sdtune.run import checkpoints, settings
from sdtune.run.files import sweep

OWN = ("config.yaml", settings.METHOD, "metrics.jsonl", "report.html", "environment.json", "README.md", "exit.json")
"""Files of a run besides its artefact. --overwrite removes them and OWN_FOLDERS."""
OWN_FOLDERS = ("checkpoints", "samples", "logs", "exports")
CLASS_IMAGES = "class-pictures"
"""Folder of a DreamBooth run with the class images that it generates."""
NEW = ".new"
"""Folder, within the target folder, in which an artefact of several parts is written first."""
ARTEFACT = "artefact.json"
"""File with the artefact's step and the names of its files. It is written last, so that it names all files or none."""
FIRST_LINE = "# sdtune "
"""The beginning of each config.yaml that a run writes: the command that continues it, as a comment."""
SHEET = re.compile(r"step-(\d{6,})\.png")
"""Names of the sample sheets that a run writes."""
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
    for folder in (*checkpoints.found(out / "checkpoints"), *exports, out / "logs"):
        shutil.rmtree(folder, ignore_errors=True)
    for name in OWN_FOLDERS:  # what the user put there stays
        with suppress(OSError):
            (out / name).rmdir()
    for stale in (*out.glob(".push-*"), out / NEW):
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


# ---- the artefact ------------------------------------------------------------------------------------


def artefact(out: Path, step: int | None = None) -> list[Path]:
    """The files of a run that diffusers loads; empty unless all of them exist, and are of ``step`` if it is given.

    Raises:
        UserError: its record is damaged.
    """
    if (out / ARTEFACT).exists():
        of, files = recorded(out)
        whole = of is not None and step in (None, of) and all(file.is_file() for file in files)
        return files if whole else []
    config = out / "config.yaml"
    if step is not None or not config.is_file():
        return []
    try:
        recorded_method = any(name == "method" for name, _, _ in yaml_text.read_yaml(config))
    except UserError:  # a damaged config tells nothing
        return []
    # An older run recorded neither artefact nor method
    return [] if recorded_method else sorted(out.glob("*.safetensors"))


def recorded(out: Path) -> tuple[int | None, list[Path]]:
    """The step of the artefact (None while it is being written) and its files."""
    try:
        found = json.loads((out / ARTEFACT).read_text(encoding="utf-8"))
        step, names = found["step"], [PurePosixPath(name) for name in found["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out / ARTEFACT}: damaged ({error}); remove it, then give the training command again"
        ) from None
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
    """Names of the files and folders directly in ``out`` that contain ``files``."""
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
    """Write the artefact with the current weights to ``out``; its files. See ``State.export_weights``."""
    recipe.eval()
    try:
        return [Path(file) for file in recipe.export(out)]
    finally:
        recipe.train()


def export_last(recipe: Any, out: Path, step: int) -> list[Path]:
    """Write the artefact of a finished run in place of an older one, and record its files."""
    before = recorded(out)[1] if (out / ARTEFACT).exists() else []
    with failing_on_a_full_disk(out):
        record(out, None, before)
        files = export(recipe, out)
        remove(out, sorted(set(before) - set(files)))
        record(out, step, files)
    return files


def export_copy(recipe: Any, out: Path, step: int) -> None:
    """Write the current artefact to ``exports/step-000500``, complete or not at all."""
    final = out / "exports" / f"step-{step:06d}"
    new = final.with_name(f".{final.name}")
    with failing_on_a_full_disk(final):
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            export(recipe, new)
            shutil.rmtree(final, ignore_errors=True)
            new.rename(final)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def failing_on_a_full_disk(place: Path) -> Iterator[None]:
    """Turn a write error, such as a full disk, into `RunFailed`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{place}: the artefact cannot be written ({error}); make room, then give the same command again"
        ) from error
