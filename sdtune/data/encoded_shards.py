"""VAE moments of a sharded data set, computed once: a file for each shard, with the captions that go with them.

Each process encodes shards of its own, so that no two meet; a shard is written whole or not at all, so that a run that
is killed goes on with the next one. Training then reads these files alone. Images are encoded in batches that are cut
in the shard, whichever process does it, so that the numbers do not depend on how many there are.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdtune.config.sections import UserError
from sdtune.data import Record, Shards, Streamed, cache
from sdtune.run.processes import store_barrier

BATCH = 8
"""Images that are encoded together; another number would show in the last bits."""


class Encoded(Shards):
    """The shards of ``shards``, each as a file of moments; a mapping of ``Streamed.pixel_key`` to ``[2C, h, w]``."""

    def __init__(self, shards: Shards, files: list[Path]):
        super().__init__(shards.names, shards.counts, shards.contents, shards.notes, shards.column, shards.caption)
        self.files = files

    def open(self, shard: int) -> "EncodedShard":
        return EncodedShard(self.files[shard])

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        index, flip = key
        shard, nth = self.place(index)
        return self.opened(shard).tensors.get_slice("moments")[nth, int(flip)]


class EncodedShard:
    def __init__(self, file: Path):
        try:
            self.tensors = safe_open(file, framework="pt").__enter__()
            self.table = json.loads(bytes(self.tensors.get_tensor("table").numpy()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}); remove it and give the command again") from None

    def record(self, nth: int) -> Record:
        """Raises: ValueError for an image that could not be used when it was to be encoded."""
        name, captions, problem = self.table[nth]
        if problem:
            raise ValueError(problem)
        return Record(name, tuple(captions), None)


class Picture(NamedTuple):
    shard: int
    record: tuple[str, tuple[str, ...], str]
    """Name, captions, what is wrong with it."""
    pixels: Tensor
    """``[flips, 3, H, W]``; of a bad image zeros."""


class Pictures(Dataset):
    """``(shard, n)`` to its pixels as they are shown, read and decoded in the loader's workers."""

    def __init__(self, stream: Streamed):
        self.stream = stream
        self.flips = (False, True) if stream.cfg.random_flip else (False,)

    def __getitem__(self, place: tuple[int, int]) -> Picture:
        shard, nth = place
        stream, side = self.stream, self.stream.cfg.resolution
        try:
            sample, captions = stream.plain(int(stream.images.starts[shard]) + nth)
        except ValueError as error:
            stream.refuse(f"{stream.images.names[shard]}, image {nth}", error)
            return Picture(shard, ("", (), str(error)), torch.zeros(len(self.flips), len(stream.mode), side, side))
        shown = [stream.pixels(replace(sample, flip=flip)) for flip in self.flips]
        return Picture(shard, (sample.name, captions, ""), torch.stack(shown))


def encode_shards(
    folder: Path, stream: Streamed, key: str, encode: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Encoded:
    """The moments of ``stream``'s shards in ``folder``, once all are there; each process computes its share.

    Args:
        key: of the weights of the VAE.
        encode: pixels ``[B, 3, H, W]`` to moments ``[B, 2C, h, w]``, which have no more bits than ``dtype``.

    Raises: UserError for an image that cannot be used, or a full disk.
    """
    state, shards, cfg = PartialState(), stream.images, stream.cfg
    pictures = Pictures(stream)
    how = (key, dtype, cfg.resolution, cfg.image_interpolation_mode, pictures.flips, shards.column, shards.caption)
    folder = folder / cache.digest(*how)
    folder.mkdir(parents=True, exist_ok=True)
    parts = zip(shards.names, shards.contents, strict=True)
    files = [folder / f"{cache.digest(name, content)}.safetensors" for name, content in parts]
    there = set(folder.iterdir())
    todo = [n for n, file in enumerate(files) if file not in there and shards.counts[n]]
    mine = todo[state.process_index :: state.num_processes]
    store_barrier()  # all have looked before the first writes
    batches = [
        [(shard, nth) for nth in range(first, min(first + BATCH, int(shards.counts[shard])))]
        for shard in mine
        for first in range(0, int(shards.counts[shard]), BATCH)
    ]
    loader = DataLoader(pictures, batch_sampler=batches, num_workers=cfg.dataloader_num_workers, collate_fn=list)
    title = f"Encoding {len(todo)} shards"
    shown = track(loader, title, disable=not state.is_main_process or len(batches) < 8, transient=True)
    for shard, tensors in _by_shard(shown, encode, dtype):
        if shard == mine[0]:
            _require_room(folder, tensors, int(shards.counts[todo].sum()) / int(shards.counts[shard]))
        cache.write(files[shard], tensors, "make room, or name another --shard-cache")
    store_barrier()
    return Encoded(shards, files)


def _by_shard(
    batches: Any, encode: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each shard with its tensors, as soon as its last image is encoded: ``moments`` ``[images, flips, 2C, h, w]``."""
    shard, table, moments = -1, [], []

    def tensors() -> dict[str, Tensor]:
        text = bytearray(json.dumps(table).encode())
        return {"moments": torch.cat(moments), "table": torch.frombuffer(text, dtype=torch.uint8)}

    for batch in batches:
        if batch[0].shard != shard and table:
            yield shard, tensors()
            table, moments = [], []
        shard = batch[0].shard
        table += [picture.record for picture in batch]
        pixels = torch.stack([picture.pixels for picture in batch])
        moments.append(encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).to(dtype).cpu().contiguous())
    if table:
        yield shard, tensors()


def _require_room(folder: Path, tensors: dict[str, Tensor], shards: float) -> None:
    """Raises: UserError if the first shard says that ``shards`` like it do not fit."""
    need = shards * sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"--shard-cache {folder.parent}: wants {need / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; make "
            "room, or leave it out"
        )
