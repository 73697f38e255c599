"""A cache of tensors on disk. The key of a tensor is a hash of what it was computed from.

A store is a folder of safetensors files, which are memory-mapped. Each file is written under another name and then
renamed, so a run that dies leaves no half-written file, and two runs that fill one store at the same time compute a
tensor twice at worst.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtune.config.sections import UserError
from sdtune.data import cache_root
from sdtune.run.processes import store_barrier

CHUNK = 64
"""Tensors in a file. A run that dies loses at most this many."""


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def weights_digest(module: nn.Module) -> str:
    """Content key of a model: its class, its configuration, and every weight."""
    sha = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:24]


Entry: TypeAlias = Tensor | dict[str, Tensor]
"""What a store has under a key: one tensor, or several by name, which its files hold as ``key/name``."""


class Store(Mapping[str, Any]):
    """The entries of a folder by key. Each process that reads them opens the files itself."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.opened: dict[str, Any] = {}
        self.index: dict[str, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    self.index |= dict.fromkeys(tensors.keys(), file.name)
            except SafetensorError:
                file.unlink()  # a disk error: its tensors are computed again
        self.names: dict[str, list[str]] = {}
        for tensor in self.index:
            key, _, name = tensor.partition("/")
            self.names.setdefault(key, []).append(name)

    def __getitem__(self, key: str) -> Any:
        names = self.names[key]
        if names == [""]:
            return self._file_of(key).get_tensor(key)
        return {name: self._file_of(f"{key}/{name}").get_tensor(f"{key}/{name}") for name in names}

    def length(self, key: str, name: str) -> int:
        """The first dimension of a tensor of an entry, without reading it; 0 where there is no such tensor."""
        if name not in self.names[key]:
            return 0
        return int(self._file_of(f"{key}/{name}").get_slice(f"{key}/{name}").get_shape()[0])

    def _file_of(self, tensor: str) -> Any:
        name = self.index[tensor]
        if name not in self.opened:
            self.opened[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self.opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": {}}  # an open file does not travel to a loader's worker


class MetaStore(Mapping[str, Any]):
    """Stands for a store when the model is on the meta device: gives tensors that have a shape and no values."""

    def __init__(self, keys: Iterable[str], compute: Callable[[str], Entry]):
        self.known, self.compute = list(keys), compute

    def __getitem__(self, key: str) -> Any:
        return self.compute(key)

    def length(self, key: str, name: str) -> int:
        """The first dimension of a tensor of an entry; 0 where there is no such tensor."""
        entry = self.compute(key)
        return len(entry[name]) if isinstance(entry, dict) and name in entry else 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def write_tensors(
    file: Path,
    tensors: dict[str, Tensor],
    way_out: str = "make room, set SDTUNE_CACHE to a folder on another disk, or train with --no-cache",
) -> None:
    """Write a file of a store. If the run dies or the disk is full, there is no file."""
    new = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, new)
        new.replace(file)
    except (OSError, SafetensorError) as error:  # a full disk is either
        new.unlink(missing_ok=True)
        raise UserError(f"{file.parent}: the cache cannot be written ({error}); {way_out}") from None


def cached_tensors(
    name: str, source: Callable[[], str] | None, keys: Iterable[str], compute: Callable[[str], Entry], title: str
) -> Store | MetaStore:
    """The entries that ``compute`` gives for ``keys``: read from the store ``name``, or computed and stored now.

    Args:
        source: a digest of all that ``compute`` depends on except the key, such as the weights of the model that it
            runs. ``None`` for a model on the meta device.
        title: of the progress bar.
    """
    if source is None:
        return MetaStore(keys, compute)
    return fill(cache_root() / name / source(), keys, compute, title)


def fill(folder: Path, keys: Iterable[str], compute: Callable[[str], Entry], title: str) -> Store:
    """Fill the store at ``folder`` so that it holds ``keys``. Each process computes a share of the missing ones.

    Tensors are computed one at a time. In a batch, the size of the batch would change their last bits, and who
    shares a batch depends on the number of processes.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    missing = sorted(set(keys) - Store(folder).names.keys())
    store_barrier()  # nobody writes before all processes have listed what is missing
    mine = missing[state.process_index :: state.num_processes]
    chunks = [mine[i : i + CHUNK] for i in range(0, len(mine), CHUNK)]
    todo = ((chunk, key) for chunk in chunks for key in chunk)
    done: dict[str, Tensor] = {}
    quiet = not state.is_main_process or len(mine) < CHUNK
    for chunk, key in track(todo, f"{title} ({len(missing)} of them)", total=len(mine), disable=quiet, transient=True):
        entry = compute(key)
        tensors = {f"{key}/{name}": x for name, x in entry.items()} if isinstance(entry, dict) else {key: entry}
        done |= {name: x.cpu().contiguous() for name, x in tensors.items()}
        if key == chunk[-1]:
            write_tensors(folder / f"{digest(*chunk)}.safetensors", done)
            done = {}
    store_barrier()
    return Store(folder)
