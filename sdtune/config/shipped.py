"""The files that come with sdtune: recipes for --config, accelerate configs, scripts for Slurm; found by name."""

import difflib
from collections.abc import Mapping
from pathlib import Path

from sdtune.config.errors import UserError

PLACES = ("accelerate", "slurm")
"""Folders, beside those of the recipes, of files that say where to train."""


def ready_made(*kinds: str) -> dict[str, Path]:
    """Name, such as lora/tiny-hearts, to file, of what comes with sdtune in the folders named, or in all."""
    here = Path(__file__).parent.parent
    root = here / "_recipes" if (here / "_recipes").is_dir() else here.parent / "recipes"
    files = sorted([*root.glob("*/*.yaml"), *root.glob("*/*.sbatch")])
    return {str(p.relative_to(root).with_suffix("")): p for p in files if not kinds or p.parent.name in kinds}


def recipes() -> dict[str, Path]:
    """Name, such as lora/tiny-hearts, to the file of each ready-made recipe."""
    return {name: path for name, path in ready_made().items() if path.parent.name not in PLACES}


def config_file(name: str) -> Path:
    """The file that ``--config`` means: a path, or the name of a ready-made recipe."""
    return found(name, "--config", recipes(), "recipe")


def accelerate_file(name: str) -> Path:
    """The file that ``--accelerate-config`` means: a path, or the name of a ready-made one, such as fsdp2."""
    known = {name.partition("/")[2]: path for name, path in ready_made("accelerate").items()}
    return found(name.removeprefix("accelerate/"), "--accelerate-config", known, "accelerate config")


def found(name: str, option: str, known: Mapping[str, Path], what: str) -> Path:
    """The file at the path ``name``, or the one that ``known`` has under it.

    Raises:
        UserError: there is neither.
    """
    if (path := Path(name).expanduser() if name.startswith("~/") else Path(name)).is_file():
        return path
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    raise UserError(
        f"{option} {name}: no such file or {what}".strip()
        + (f"; did you mean {close[0]}?" if close else "; `sdtune ls` lists them")
    )
