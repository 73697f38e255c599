"""Finds the files of a dataset folder, and sorts out links that leave it, masks, and what sdtune itself wrote."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sdtune.config.sections import UserError
from sdtune.data.images import ACCEPTED, EXTENSIONS
from sdtune.data.metadata import Metadata, listed_error, read_metadata
from sdtune.run.folder import is_run, own_entries

MASK_FOLDERS = ("masks", "mask")
_MASK = re.compile(r"(.+)(?:-|_|\.)(?:mask|masklabel)", re.IGNORECASE)
_CLASS_IMAGE = re.compile(r"made-\d+\.png")
_LOCAL = re.compile(r"^(?:file|local)://")


@dataclass
class FolderFiles:
    """The files below a folder, by their names relative to it."""

    folder: Path
    images: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    """Name of an image -> its mask."""
    paired: dict[str, Path] = field(default_factory=dict)
    """Images that belong to others, such as the edges that a ControlNet follows: see ``paired``."""
    others: dict[str, Path] = field(default_factory=dict)
    """Files that are neither images nor masks: captions, tables, and files that are not used."""
    ignored: list[str] = field(default_factory=list)
    """Names of hidden files, devices, and masks without an image."""
    linked: list[str] = field(default_factory=list)
    """Names of folders that are links, which are not read without ``--follow-links``."""
    own: list[str] = field(default_factory=list)
    """Names of folders and images that sdtune wrote."""
    outside: set[str] = field(default_factory=set)
    """Names of files that are links out of the folder, or lie in a folder that is one."""
    read: dict[str, Metadata] = field(default_factory=dict)
    """Tables that have been read, by name."""

    def table(self, name: str) -> Metadata:
        """The columns, rows and problems of the table ``name`` of ``others``, which is read once."""
        if name not in self.read:
            self.read[name] = read_metadata(self.others[name], name)
        return self.read[name]

    def refuse_outside(self, names: Iterable[str], way_out: str) -> None:
        """Raises: UserError if one of ``names`` is a link out of the folder."""
        if found := sorted(self.outside.intersection(names)):
            head = f"{self.folder}: links lead out of the dataset folder; {way_out}"
            raise listed_error(head, [f"{name} -> {os.path.realpath(self.folder / name)}" for name in found])


def find_files(folder: Path, dataset: str, follow_links: bool = False, leave_out: Path | None = None) -> FolderFiles:
    """The files below ``folder``.

    Args:
        dataset: the value of ``--dataset``, for messages.
        follow_links: read images that are links out of the folder, and folders that are links.
        leave_out: a folder below it that is not read.

    Raises:
        UserError: there are no images, an image is a link out of the folder, or a folder cannot be read.
    """
    found = FolderFiles(folder)
    for name, path in _walk(found, follow_links, leave_out):
        kind = found.images if os.path.splitext(name)[1].lower() in EXTENSIONS else found.others  # noqa: PTH122  fast
        kind[name] = path
    _leave_out_class_images(found)
    _pair_masks(found)
    if not found.images:
        raise UserError(f"--dataset {dataset}: no images in {folder.absolute()}{_reason(found)}")
    if not follow_links:
        found.refuse_outside(
            [*found.images, *(_name(path, folder) for path in found.masks.values())],
            "copy the images into it, or read them with --follow-links",
        )
    return found


def find_images(folder: Path, leave_out: Path | None = None) -> list[Path]:
    """The image files below ``folder`` that ``find_files`` finds, sorted by name; empty if there are none."""
    try:
        found = find_files(folder, str(folder), follow_links=True, leave_out=leave_out)
    except UserError:
        return []
    return [found.images[name] for name in sorted(found.images)]


def _reason(found: FolderFiles) -> str:
    """Why there are no images, as the end of a message."""
    if found.own:
        return f": {', '.join(found.own[:3])} was written by sdtune, which is never its input"
    if found.linked:
        return f"; {', '.join(found.linked[:3])} is a link to a folder, which --follow-links reads"
    endings = {Path(name).suffix.lower() for name in found.others}
    if archives := sorted(endings & {".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"}):
        return f"; unpack the {' and '.join(archives)} files first"
    if ".arrow" in endings:
        return "; the .arrow files are a cache of the datasets library: save the dataset with save_to_disk"
    return f"; accepted are {ACCEPTED}"


def _walk(found: FolderFiles, follow_links: bool, leave_out: Path | None) -> Iterator[tuple[str, Path]]:
    """The files with their names; fills ``ignored``, ``linked``, ``own`` and ``outside`` of ``found``."""

    folder, home = found.folder, _home(found.folder)
    left_out = leave_out and leave_out.resolve()
    visited: set[Path] = set()  # targets of links to folders
    linked: set[Path] = set()  # folders that are reached through a link
    own_of_root = own_entries(folder)
    to_read = [folder]
    while to_read:
        at = to_read.pop()
        folders, files = _entries(at)
        through_link, kept = at in linked, []
        for name in folders:
            path = at / name
            skip = True
            if name.startswith("."):
                found.ignored.append(_name(path, folder) + "/")
            elif path.is_symlink() and not follow_links:
                found.linked.append(_name(path, folder) + "/")
            elif is_run(path) or (at == folder and name in own_of_root):
                found.own.append(_name(path, folder) + "/")
            elif left_out and path.resolve() == left_out:
                found.ignored.append(_name(path, folder) + "/")
            elif path.is_symlink() and (path.resolve().is_relative_to(home) or path.resolve() in visited):
                found.ignored.append(_name(path, folder) + "/")  # it is read already, or would never end
            else:
                skip = False
            if skip:
                continue
            kept.append(path)
            if through_link or path.is_symlink():
                linked.add(path)
                visited.add(path.resolve())
        to_read += reversed(kept)
        below = "" if at == folder else f"{_name(at, folder)}/"
        for entry in files:
            path, shown = at / entry.name, below + _readable(entry.name)
            if entry.name.startswith(".") or not _is(os.DirEntry.is_file, entry):
                found.ignored.append(shown)
                continue
            if through_link or (entry.is_symlink() and not path.resolve().is_relative_to(home)):
                found.outside.add(shown)
            yield shown, path


def _entries(folder: Path) -> tuple[list[str], list[os.DirEntry[str]]]:
    """The names of the folders in a folder, sorted, and its other entries, all in one look: a listing knows the kinds.

    Raises: UserError if it cannot be read.
    """
    folders, others = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is(os.DirEntry.is_dir, entry):
                    folders.append(entry.name)
                else:
                    others.append(entry)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return sorted(folders), others


def _is(kind: Callable[[os.DirEntry[str]], bool], entry: os.DirEntry[str]) -> bool:
    """Whether an entry is of a kind; a link that leads to itself is of none."""
    try:
        return kind(entry)
    except OSError:
        return False


def _home(folder: Path) -> Path:
    """The folder out of which links may not lead: its own, but in the Hub's cache the folder of the repository."""
    home = folder.resolve()
    for at in (home, *home.parents):
        repository = at.parent.parent
        if at.parent.name == "snapshots" and repository.name.startswith(("datasets--", "models--")):
            return repository  # its snapshots are links into its blobs
    return home


def _normal(path: Path) -> Path:
    """The path without ``..``, with its links."""
    return Path(os.path.normpath(path.absolute()))


def refuse_files_outside(dataset: str, folder: Path | None, files: Iterable[str], follow_links: bool) -> None:
    """Refuse tables and shards that are not in the folder of a dataset: its README.md can name any file of the machine.

    Args:
        dataset: the value of ``--dataset``, for messages.
        folder: ``None`` for a dataset of the Hub, to which no file of this machine belongs.
        files: paths or URLs; a file in an archive is ``zip://file::archive``.

    Raises:
        UserError: a file lies elsewhere, or is a link out of the folder and links are not followed.
    """
    parts = [_LOCAL.sub("", part) for file in files for part in file.split("::")]
    paths = [Path(part) for part in parts if "://" not in part]
    homes = [_normal(folder), folder.resolve()] if folder else []
    if named := [path for path in paths if not any(_normal(path).is_relative_to(home) for home in homes)]:
        raise UserError(f"--dataset {dataset}: it names {named[0]}, which is outside of the dataset, so it is not read")
    if folder and not follow_links:
        linked = [path for path in paths if not path.resolve().is_relative_to(_home(folder))]
        if linked:
            head = f"{folder}: links lead out of the dataset folder; copy the files into it, or add --follow-links"
            raise listed_error(head, [f"{path.name} -> {os.path.realpath(path)}" for path in linked])


def _name(path: Path, folder: Path) -> str:
    """The path below the folder, with slashes; the same whether or not the file system composes accents."""
    return _readable(path.relative_to(folder).as_posix())


def _readable(name: str) -> str:
    if name.isascii():
        return name  # as nearly always, and it takes a tenth of the time
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _leave_out_class_images(found: FolderFiles) -> None:
    """Class images that DreamBooth drew into a folder below this one are not images of the dataset."""
    for name in [name for name in found.images if "/" in name and _CLASS_IMAGE.fullmatch(name.rpartition("/")[2])]:
        try:
            with Image.open(found.images[name], formats=("PNG",)) as image:
                drawn = "sdtune" in image.info
        except (OSError, SyntaxError, ValueError):
            continue
        if drawn:
            del found.images[name]
            found.own.append(name)


def _pair_masks(found: FolderFiles) -> None:
    """Move masks from ``images`` to ``masks``.

    A mask is ``a-mask.png`` or ``a_mask.png`` next to ``a.jpg``, or ``masks/a.png`` in a folder next to it. In a folder
    of masks, those without an image are left out too.
    """
    if not any("mask" in name.lower() for name in found.images):
        return
    stems: dict[str, list[str]] = {}
    for name in found.images:
        stems.setdefault(name.rpartition(".")[0], []).append(name)
    masks, lonely = {}, {}
    for name in found.images:
        folder, _, last = name.rpartition("/")
        stem = last.rpartition(".")[0]
        above, _, inner = folder.rpartition("/")
        marked = _MASK.fullmatch(stem) if "mask" in stem.lower() else None
        owners = stems.get(f"{folder}/{marked[1]}" if folder else marked[1]) if marked else None
        in_mask_folder = inner.lower() in MASK_FOLDERS
        if in_mask_folder and not owners:
            stem = marked[1] if marked else stem
            owners = stems.get(f"{above}/{stem}" if above else stem)
        if owners:
            masks[name] = owners
        elif in_mask_folder:
            lonely[name] = folder
    folders = {name.rpartition("/")[0] for name in masks}
    for name, owners in masks.items():
        path = found.images.pop(name)
        found.masks |= dict.fromkeys((owner for owner in owners if owner not in masks), path)
    for name, folder in lonely.items():
        if folder in folders:
            del found.images[name]
            found.ignored.append(name)
