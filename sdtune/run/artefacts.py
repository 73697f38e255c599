"""The artefact of a run: which of its files it is, and how it is written, complete or not at all."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from sdtune.config import yaml_text
from sdtune.config.sections import RunFailed, UserError
from sdtune.run import settings

NEW = ".new"
"""Folder, within the target folder, in which an artefact of several parts is written first."""
ARTEFACT = "artefact.json"
"""File with the artefact's step and the names of its files. It is written last, so that it names all files or none."""
BEST = "best"
"""Folder with the artefact of the step that is best by `--keep-best`."""


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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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
    with replacing(out / "exports" / f"step-{step:06d}") as new:
        export(recipe, new)


def export_best(recipe: Any, out: Path, step: int) -> None:
    """Write the current artefact to ``best``, with the settings of the run, complete or not at all."""
    with replacing(out / BEST) as new:
        record(new, step, export(recipe, new))
        for name in ("config.yaml", settings.METHOD):
            shutil.copyfile(out / name, new / name)


def best(out: Path) -> tuple[int, Path] | None:
    """The step of the artefact in ``best``, and that folder; None if the run keeps none."""
    folder = out / BEST
    step = recorded(folder)[0] if (folder / ARTEFACT).exists() else None
    return None if step is None else (step, folder)


def of_best(option: str, out: Path) -> Path:
    """The folder of a run's best artefact.

    Raises:
        UserError: the run kept none.
    """
    found = best(out)
    if found is None:
        raise UserError(f"--best: {option} {out} kept no best step; train it with --evaluate-steps and --keep-best")
    return found[1]


def describe_best(out: Path, step: int) -> str:
    """A line on the best artefact of a run that ended at ``step``.

    One of a later step is removed: it is of an earlier, longer run that was cut back to a checkpoint.
    """
    found = best(out)
    if found and found[0] > step:
        shutil.rmtree(found[1])
        return f"best: the artefact in {found[1]} was of step {found[0]}, which this run did not reach, and was removed"
    if found is None:
        return "best: no score was measured, so there is none"
    return f"best: step {found[0]}, in {found[1]}"


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Context with a new folder, which takes the place of ``final`` when it is complete."""
    new = final.with_name(f".{final.name}")
    with failing_on_a_full_disk(final):
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            yield new
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
