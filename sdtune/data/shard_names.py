"""Finds the shards of a dataset: a folder of tar files, ``shards/{000000..000099}.tar``, ``shards/*.tar``, URLs."""

import itertools
import os
import re
from pathlib import Path

from sdtune.config.sections import UserError
from sdtune.data.folder_files import refuse_files_outside
from sdtune.data.images import EXTENSIONS

_BRACES = re.compile(r"\{([^{}]*)\}")


def is_sharded(dataset: str) -> bool:
    """Whether the dataset is tar files: by its name, or because the folder has tar files and no images."""
    if re.search(r"\.(tar|tgz)(\.\w+)?\}?$", dataset.partition("?")[0] if "://" in dataset else dataset):
        return True
    folder = Path(dataset).expanduser()
    if "://" in dataset or not folder.is_dir():
        return False
    found = False
    with os.scandir(folder) as entries:
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  ten times faster
            if ending in EXTENSIONS:
                return False  # so that of a folder of images one is seen and not all
            found |= ending == ".tar"
    return found


def shard_urls(dataset: str, follow_links: bool = False) -> list[str]:
    """The shards that ``dataset`` names, sorted.

    Raises: UserError if no file matches, for braces not closed, and for files of a folder that are links out of it.
    """
    found = expand_braces(dataset)
    if "://" in dataset:
        return sorted(found)
    if Path(dataset).expanduser().is_dir():
        return _matching(Path(dataset).expanduser(), "*.tar", dataset, follow_links)
    paths: list[str] = []
    for name in found:
        path = Path(name).expanduser()
        if not any(letter in path.name for letter in "*?["):
            paths.append(str(path))
        elif matching := _matching(path.parent, path.name, dataset, follow_links):
            paths += matching
        else:
            raise UserError(f"--dataset {dataset}: no file matches {name}")
    return sorted(set(paths))


def _matching(folder: Path, pattern: str, dataset: str, follow_links: bool) -> list[str]:
    found = sorted(map(str, folder.glob(pattern)))
    refuse_files_outside(dataset, folder, found, follow_links)
    return found


def expand_braces(pattern: str) -> list[str]:
    """Replace ``{00..12}`` by the numbers, with as many digits as the first, and ``{a,b}`` by the words.

    Raises: UserError for braces that match nothing.
    """
    parts: list[list[str]] = []
    end = 0
    for braces in _BRACES.finditer(pattern):
        parts += [[pattern[end : braces.start()]], _choices(pattern, braces[1])]
        end = braces.end()
    parts.append([pattern[end:]])
    if any("{" in word or "}" in word for part in parts for word in part):
        raise UserError(f"--dataset {pattern}: braces that are not closed; write {{000000..000099}} or {{a,b}}")
    return ["".join(words) for words in itertools.product(*parts)]


def _choices(pattern: str, inside: str) -> list[str]:
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = numbers.groups()
        if int(first) > int(last):
            raise UserError(f"--dataset {pattern}: {{{inside}}} matches nothing; the smaller number goes first")
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    words = [word for word in inside.split(",") if word]
    if not words or ".." in inside:
        raise UserError(f"--dataset {pattern}: {{{inside}}} matches nothing; write {{000000..000099}} or {{a,b}}")
    return words
