"""A cache of tensors on disk. The key of a tensor is a hash of what it was computed from.

A store is a folder of safetensors files, which are memory-mapped. Each file is written under another name and then
renamed, so a run that dies leaves no half-written file, and two runs that fill one store at the same time compute a
tensor twice at worst. Each tensor has a checksum, which is compared when the tensor is read.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import PartialState
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdtune.config.sections import RunFailed, UserError
from sdtune.config.slow_imports import keeping
from sdtune.data import cache_root
from sdtune.run.barrier import store_barrier
from sdtune.run.files import save_tensors, sweep

CHUNK = 64
"""Tensors in a file. A run that dies loses at most this many."""
CHECKSUMS = "checksums"
"""Key of a file's metadata: a JSON object with the checksum of each tensor."""


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def weights_digest(module: nn.Module) -> str:
    """Content key of a model: its class, its configuration, and every weight."""
    sha = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:24]


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes as 64-bit words, modulo 2^64, as an int64. Any flipped bit changes it.

    It takes a fifth of the time of reading the tensor from the page cache; CRC-32 takes three times as long.
    """
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    end = len(content) // 8 * 8
    words, rest = content[:end].view(np.uint64), int.from_bytes(content[end:].tobytes(), "little")
    total = (int(words.sum(dtype=np.uint64)) + rest) % 2**64
    return total - (total >> 63 << 64)


Entry: TypeAlias = Tensor | dict[str, Tensor]
"""What a store has under a key: one tensor, or several by name, which its files hold as ``key/name``."""


class Store(Mapping[str, Any]):
    """The entries of a folder by key. Each process that reads them opens the files itself."""

    @keeping()
    def __init__(self, folder: Path):
        self.folder = folder
        self.opened: dict[str, Any] = {}
        self.index: dict[str, tuple[str, int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                tensors = safe_open(file, framework="pt")
                sums, within = json.loads((tensors.metadata() or {})[CHECKSUMS]), file.name
                self.index |= {name: (within, int(sums[name])) for name in tensors.keys()}  # noqa: SIM118
                self.opened[within] = tensors  # so that no step opens a file
            except (SafetensorError, ValueError):
                with suppress(OSError):  # damaged: its tensors are computed again
                    file.unlink()
            except (OSError, LookupError):  # of another user who keeps it to himself, or without checksums
                continue
        self.names: dict[str, list[str]] = {}
        for tensor in self.index:
            key, _, name = tensor.partition("/")
            self.names.setdefault(key, []).append(name)

    def __getitem__(self, key: str) -> Any:
        """Raises: RunFailed when the bytes on the disk have changed. The file is removed; the next run computes it."""
        names = self.names[key]
        if names == [""]:
            return self._read(key)
        return {name: self._read(f"{key}/{name}") for name in names}

    def longest(self, keys: Iterable[str], name: str) -> int:
        """The largest first dimension of a tensor of some entries, which are not read; 0 where there is none."""
        if not any(name in names for names in self.names.values()):
            return 0  # and 100,000 keys are not made
        tensors = [f"{key}/{name}" for key in keys if name in self.names[key]]
        return max((int(self._file_of(t).get_slice(t).get_shape()[0]) for t in tensors), default=0)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of(name).get_tensor(name)
        file, expected = self.index[name]
        if checksum(tensor) != expected:
            with suppress(OSError):
                (self.folder / file).unlink()
            raise RunFailed(
                f"{self.folder / file}: damaged on the disk (a checksum differs), so it was removed; give the same "
                "command again, which computes it anew"
            )
        return tensor

    def _file_of(self, tensor: str) -> Any:
        name = self.index[tensor][0]
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

    def longest(self, keys: Iterable[str], name: str) -> int:
        """The largest first dimension of a tensor of some entries; 0 where the first entry has no such tensor."""
        largest = 0
        for key in keys:
            entry = self.compute(key)
            if not isinstance(entry, dict) or name not in entry:
                break  # nor has any other, and to trace a text encoder takes a tenth of a second
            largest = max(largest, len(entry[name]))
        return largest

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
    try:
        sums = json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})
        save_tensors(tensors, file, {CHECKSUMS: sums})
    except (OSError, SafetensorError) as error:  # a full disk is either
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


def make_folder(
    folder: Path, way_out: str = "set SDTUNE_CACHE to a folder that you may write to, or train with --no-cache"
) -> None:
    """Make a folder of the cache, and remove what killed processes left in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    except OSError as error:
        raise UserError(f"{folder}: the cache cannot be written ({error.strerror}); {way_out}") from None


def fill(folder: Path, keys: Iterable[str], compute: Callable[[str], Entry], title: str) -> Store:
    """Fill the store at ``folder`` so that it holds ``keys``. Each process computes a share of the missing ones.

    Tensors are computed one at a time. In a batch, the size of the batch would change their last bits, and who
    shares a batch depends on the number of processes.
    """
    state = PartialState()
    make_folder(folder)
    before = Store(folder)
    missing = sorted(set(keys) - before.names.keys())
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
    return Store(folder) if missing else before
