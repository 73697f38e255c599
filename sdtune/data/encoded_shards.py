"""VAE moments of a sharded dataset, computed once: one file for each shard, which also holds the captions.

Each process encodes other shards. The file of a shard appears when it is complete, so a run that was killed continues
with the next shard. Training then reads only these files. Batches are cut inside a shard in the same way in every
process, so the moments do not depend on the number of processes.
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

from sdtune.config.sections import RunFailed, UserError
from sdtune.data import Record, Shards, ShardStream, cache
from sdtune.run.barrier import store_barrier

BATCH = 8
"""Images that are encoded together. Another number would change the last bits of the moments."""


class EncodedShards(Shards):
    """``shards`` as files of moments. It maps ``ShardStream.pixel_key`` to moments ``[2C, h, w]``.

    Args:
        flips: variants of each image and of each paired image, 2 where images are mirrored.
    """

    def __init__(self, shards: Shards, files: list[Path], flips: int):
        super().__init__(shards.names, shards.counts, shards.contents, shards.notes, shards.column, shards.caption)
        self.files, self.flips = files, flips

    def open(self, shard: int) -> "EncodedShard":
        return EncodedShard(self.files[shard])

    def __getitem__(self, key: tuple[int, bool, int]) -> Tensor:
        index, flip, which = key
        shard, nth = self.locate(index)
        return self.get_open(shard).moments(nth, which * self.flips + int(flip))


class EncodedShard:
    def __init__(self, file: Path):
        try:
            self.tensors = safe_open(file, framework="pt").__enter__()
            table = self.tensors.get_tensor("table")
            # Files of older versions have no checksums
            self.sums = self.tensors.get_tensor("sums") if "sums" in self.tensors.keys() else None  # noqa: SIM118
            if self.sums is not None and cache.checksum(table) != int(self.sums[-1, 0]):
                raise ValueError("a checksum differs")
            self.table = json.loads(bytes(table.numpy()))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); remove it and give the command again") from None
        self.file = file

    def moments(self, nth: int, variant: int) -> Tensor:
        """Raises: RunFailed when the bytes on the disk have changed."""
        moments: Tensor = self.tensors.get_slice("moments")[nth, variant]
        if self.sums is not None and cache.checksum(moments) != int(self.sums[nth, variant]):
            raise RunFailed(
                f"{self.file}: damaged on the disk (a checksum differs); remove it and give the command again"
            )
        return moments

    def record(self, nth: int) -> Record:
        """Raises: ValueError for an image that could not be used when the shard was encoded."""
        name, captions, problem, size = self.table[nth]
        if problem:
            raise ValueError(problem)
        return Record(name, tuple(captions), None, tuple(size))


class EncodingItem(NamedTuple):
    shard: int
    record: tuple[str, tuple[str, ...], str, tuple[int, int]]
    """Name, captions, what is wrong with the image, and its width and height."""
    pixels: Tensor
    """``[variants, 3, H, W]``: flips of the image, then those of each paired image; zeros for a bad image."""


class ShardImages(Dataset[EncodingItem]):
    """``(shard, n)`` -> the pixels that training shows, read and decoded in the loader's workers."""

    def __init__(self, stream: ShardStream):
        self.stream = stream
        self.flips = (False, True) if stream.cfg.random_flip else (False,)
        self.columns = (None, *stream.paired)

    def __getitem__(self, place: tuple[int, int]) -> EncodingItem:
        shard, nth = place
        stream, side = self.stream, self.stream.cfg.resolution
        try:
            sample, captions = stream.unaugmented(int(stream.images.starts[shard]) + nth)
        except ValueError as error:
            stream.reject(f"{stream.images.names[shard]}, image {nth}", error)
            black = torch.zeros(len(self.flips) * len(self.columns), len(stream.mode), side, side)
            return EncodingItem(shard, ("", (), str(error), (0, 0)), black)
        shown = [stream.pixels(replace(sample, flip=flip), of) for of in self.columns for flip in self.flips]
        return EncodingItem(shard, (sample.name, captions, "", stream.image_size(sample)), torch.stack(shown))


def encode_shards(
    folder: Path, stream: ShardStream, key: str, encode: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> EncodedShards:
    """Encode the shards of ``stream``, paired images too, into ``folder``; each process a share of the missing ones.

    Args:
        key: identifies the weights of the VAE.
        encode: pixels ``[B, 3, H, W]`` -> moments ``[B, 2C, h, w]``, which have no more bits than ``dtype``.

    Raises: UserError for an image that cannot be used, or a full disk.
    """
    state, shards, cfg = PartialState(), stream.images, stream.cfg
    images = ShardImages(stream)
    how = [key, dtype, cfg.resolution, cfg.image_interpolation_mode, images.flips, shards.column, shards.caption]
    how.append("with sizes")
    how += ["caption per line"] if stream.caption_options and stream.caption_options.caption_per_line else []
    how += [f"with {column}" for column in stream.paired]
    folder = folder / cache.digest(*how)
    cache.make_folder(folder, "name another --shard-cache")
    parts = zip(shards.names, shards.contents, strict=True)
    files = [folder / f"{cache.digest(name, content)}.safetensors" for name, content in parts]
    present = set(folder.iterdir())
    todo = [n for n, file in enumerate(files) if file not in present and shards.counts[n]]
    mine = todo[state.process_index :: state.num_processes]
    store_barrier()  # nobody writes before all processes have listed what is missing
    batches = [
        [(shard, nth) for nth in range(first, min(first + BATCH, int(shards.counts[shard])))]
        for shard in mine
        for first in range(0, int(shards.counts[shard]), BATCH)
    ]
    loader = DataLoader(images, batch_sampler=batches, num_workers=cfg.loader_workers(True), collate_fn=list)
    title = f"Encoding {len(todo)} shards"
    shown = track(loader, title, disable=not state.is_main_process or len(batches) < 8, transient=True)
    for shard, tensors in _by_shard(shown, encode, dtype):
        if shard == mine[0]:
            _require_room(folder, tensors, int(shards.counts[todo].sum()) / int(shards.counts[shard]))
        cache.write_tensors(files[shard], tensors, "make room, or name another --shard-cache")
    store_barrier()
    return EncodedShards(shards, files, len(images.flips))


def _by_shard(
    batches: Any, encode: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each shard with its tensors, when its last image is encoded: ``moments`` ``[images, variants, 2C, h, w]``."""
    shard = -1
    table: list[tuple[str, tuple[str, ...], str]] = []
    moments: list[Tensor] = []

    def tensors() -> dict[str, Tensor]:
        text = bytearray(json.dumps(table).encode())
        whole, listed = torch.cat(moments), torch.frombuffer(text, dtype=torch.uint8)
        sums = [[cache.checksum(variant) for variant in image] for image in whole]  # one for each image and variant
        sums.append([cache.checksum(listed)] * whole.shape[1])
        return {"moments": whole, "table": listed, "sums": torch.tensor(sums)}

    for batch in batches:
        if batch[0].shard != shard and table:
            yield shard, tensors()
            table, moments = [], []
        shard = batch[0].shard
        table += [item.record for item in batch]
        pixels = torch.stack([item.pixels for item in batch])
        encoded = encode(pixels.flatten(0, 1))
        moments.append(encoded.reshape(*pixels.shape[:2], *encoded.shape[1:]).to(dtype).cpu().contiguous())
    if table:
        yield shard, tensors()


def _require_room(folder: Path, tensors: dict[str, Tensor], shards: float) -> None:
    """Raises: UserError if ``shards`` shards of the size of this one do not fit on the disk."""
    need = shards * sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"--shard-cache {folder.parent}: needs {need / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; make "
            "room, or leave it out"
        )
