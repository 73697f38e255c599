"""Tensors computed once and kept on disk, memory-mapped, each under a key made of what it was computed from.

A store is a folder of safetensors files, each written under another name and renamed, so that a run that dies
leaves nothing half-written, and two runs that fill the same store at once at worst compute a tensor twice.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

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
"""Tensors in a file: what a run that dies loses at most."""


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def weights_digest(module: nn.Module) -> str:
    """Content key of a model: its class, its configuration, and every weight."""
    sha = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:24]


class Store(Mapping[str, Tensor]):
    """The tensors of a folder by key; opened anew in each process that reads them."""

    def __init__(self, folder: Path):
        self.folder, self.opened = folder, {}
        self.index: dict[str, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    self.index |= dict.fromkeys(tensors.keys(), file.name)
            except SafetensorError:
                file.unlink()  # a disk error: what it held is computed again

    def __getitem__(self, key: str) -> Tensor:
        name = self.index[key]
        if name not in self.opened:
            self.opened[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self.opened[name].get_tensor(key)

    def __iter__(self):
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": {}}  # an open file does not travel to a loader's worker


class Outlines(Mapping[str, Tensor]):
    """What a store would hold, of a model on the meta device: shapes, computed when they are asked for."""

    def __init__(self, keys: Iterable[str], compute: Callable[[str], Tensor]):
        self.known, self.compute = list(keys), compute

    def __getitem__(self, key: str) -> Tensor:
        return self.compute(key)

    def __iter__(self):
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def write(
    file: Path,
    tensors: dict[str, Tensor],
    way_out: str = "make room, set SDTUNE_CACHE to a folder on another disk, or train with --no-cache",
) -> None:
    """A file of the store, whole or not at all."""
    new = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, new)
        new.replace(file)
    except (OSError, SafetensorError) as error:  # a full disk is either
        new.unlink(missing_ok=True)
        raise UserError(f"{file.parent}: the cache cannot be written ({error}); {way_out}") from None


def keep(name: str, module: nn.Module, keys: Iterable[str], compute: Callable[[str], Tensor], title: str) -> Any:
    """What ``compute`` makes of ``keys`` by the weights of ``module``: the store ``name`` of exactly those, filled."""
    if module.device.type == "meta":
        return Outlines(keys, compute)
    return fill(cache_root() / name / weights_digest(module), keys, compute, title)


def fill(folder: Path, keys: Iterable[str], compute: Callable[[str], Tensor], title: str) -> Store:
    """The store at ``folder`` once it holds ``keys``; each process computes its share of what is missing.

    One tensor is computed at a time: how many share a batch would show in its last bits, and which share one
    depends on the number of processes.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    missing = sorted(set(keys) - Store(folder).index.keys())
    store_barrier()  # all have looked before one writes, so that the shares are of one list
    mine = missing[state.process_index :: state.num_processes]
    chunks = [mine[i : i + CHUNK] for i in range(0, len(mine), CHUNK)]
    todo = ((chunk, key) for chunk in chunks for key in chunk)
    done: dict[str, Tensor] = {}
    quiet = not state.is_main_process or len(mine) < CHUNK
    for chunk, key in track(todo, f"{title} ({len(missing)} of them)", total=len(mine), disable=quiet, transient=True):
        done[key] = compute(key).cpu().contiguous()
        if len(done) == len(chunk):
            write(folder / f"{digest(*chunk)}.safetensors", done)
            done = {}
    store_barrier()
    return Store(folder)
