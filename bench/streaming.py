"""Compares tar shards with a folder of the same files, in images a CPU second: only a loader worker's work, no model.

    python bench/streaming.py --rounds 3 [--images 1000 --side 512 --shards 8]

Rounds alternate, so that a busy machine slows both equally. Seconds are CPU seconds of this process; only their ratio
within one call is meaningful. Both sides read, decode, crop and convert the same images, each in its own seeded order,
from files in the system's page cache. The start is measured separately: a folder's images are decoded once, a tar's
headers are read.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from sdtune.config.methods.lora import LoraConfig
from sdtune.data import Stream, open_images, open_stream


def photograph(number: int, side: int) -> bytes:
    """A JPEG of soft colours and some grain, of about the size of a photograph's."""
    draws = np.random.default_rng(number)
    soft = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))
    grain = draws.normal(0, 12, (side, side, 1))
    pixels = np.clip(np.asarray(soft.filter(ImageFilter.GaussianBlur(4))) + grain, 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=90)
    return data.getvalue()


def write(work: Path, images: int, side: int, shards: int) -> float:
    """The same files in ``work/folder`` and in tars in ``work/shards``; the mean size of an image in bytes."""
    (work / "folder").mkdir()
    (work / "shards").mkdir()
    total = 0
    for shard in range(shards):
        with tarfile.open(work / "shards" / f"{shard:06}.tar", "w") as tar:
            for number in range(shard * images // shards, (shard + 1) * images // shards):
                members = {"jpg": photograph(number, side), "txt": f"picture {number}".encode()}
                total += len(members["jpg"])
                for ending, data in members.items():
                    (work / "folder" / f"{number:06}.{ending}").write_bytes(data)
                    header = tarfile.TarInfo(f"{number:06}.{ending}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    return total / images


def images_per_second(stream: Stream, first: int, count: int) -> float:
    """Of ``count`` images from position ``first`` on."""
    start = time.process_time()
    for position in range(first, first + count):
        stream.pixels(stream[position])
    return count / (time.process_time() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["SDTUNE_CACHE"] = str(work / "cache")
        size = write(work, given.images, given.side, given.shards)
        streams = {}
        for arm in ("folder", "shards"):
            cfg = LoraConfig(dataset=str(work / arm), resolution=given.side)
            start = time.process_time()
            streams[arm] = open_stream(cfg, open_images(cfg), group=16)
            seconds = time.process_time() - start
            print(f"{arm}: ready in {seconds:.2f} CPU s, for {given.images} images of {size / 1e3:.0f} kB")
        rates: dict[str, list[float]] = {arm: [] for arm in streams}
        for round in range(given.rounds):
            for arm, stream in streams.items():
                rates[arm].append(images_per_second(stream, round * given.images, given.images))
        folder, shards = (statistics.median(rates[arm]) for arm in ("folder", "shards"))
        print(f"folder {folder:.1f}, shards {shards:.1f} images a CPU second; ratio {shards / folder:.3f}")
        for arm, each in rates.items():
            print(f"  {arm}: {', '.join(f'{rate:.1f}' for rate in each)}")
