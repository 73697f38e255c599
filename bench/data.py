"""Measures what a dataset costs by its size: a second start up to the first step, and one item.

    python bench/data.py --work runs/bench-data --images 100 1000 10000

Pictures of the toy world with captions of their own, 32 px, on `tiny`. A start without a cache remembers the pictures
alone; one with a cache finds the moments and the text of each in it. The first start of each size, which fills the
cache, is not measured, and what it keeps is encoded once for all: a start reads how much is there and not what it is.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import shapes
from harness import in_turn, parser, report, run

from sdtune.config.methods.lora import LoraConfig
from sdtune.data import open_images, open_stream

FILL = """
import copy
import sys
from sdtune.cli import main
from sdtune.models.families.latent import LatentFamily
from sdtune.models.families.text import TextFamily

def first(encode):
    known = []
    def answer(family, asked):
        known[:] = known or [encode(family, asked)]
        return copy.deepcopy(known[0])
    return answer

LatentFamily.moments, TextFamily.encode = first(LatentFamily.moments), first(TextFamily.encode)
main(sys.argv[1:])
"""
"""A command line that encodes the first picture and the first caption alone, as if all others were like them."""


def cache_of(folder: Path) -> str:
    """A cache for each dataset, since a start opens all that is in it."""
    return str(folder.with_name(f"{folder.name}-cache"))


def seconds_of_an_item(folder: Path, side: int, count: int = 100) -> Callable[[], float]:
    """CPU seconds of reading an image, in the order of a run."""
    os.environ["SDTUNE_CACHE"] = cache_of(folder)
    cfg = LoraConfig(dataset=str(folder), resolution=side, output_dir=folder.parent / "none")
    stream = open_stream(cfg, open_images(cfg), group=4)
    first = iter(range(0, 10**9, count))

    def measure() -> float:
        begin, start = next(first), time.process_time()
        for position in range(begin, begin + count):
            stream.pixels(stream[position])
        return (time.process_time() - start) / count

    return measure


def main() -> None:
    made = parser(__doc__, rounds=3)
    made.add_argument("--work", type=Path, required=True, help="where pictures and runs go")
    made.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10000])
    given = made.parse_args()
    folders = {count: shapes.pictures(given.work / f"pictures-{count}", count, 32) for count in given.images}

    def start(folder: Path, *options: str, program: Sequence[str] = ("-m", "sdtune")) -> float:
        words = [*program, *"lora --model tiny --resolution 32 --overwrite --steps 1".split(), "--dataset", str(folder)]
        words += ["--num-validation-images", "0", "--dataloader-num-workers", "0", *options]
        return run([*words, "--output-dir", str(given.work / "run")], SDTUNE_CACHE=cache_of(folder)).cpu

    for folder in folders.values():
        start(folder, program=("-c", FILL))
    for title, options in (("no cache", ["--no-cache"]), ("its cache full", [])):
        starts = {f"{count:,} images": partial(start, folder, *options) for count, folder in folders.items()}
        report(f"a second start, {title}, to the end of step 1", in_turn(starts, given.rounds), "CPU s", given.json)
    items = {f"{count:,} images": seconds_of_an_item(folder, 32) for count, folder in folders.items()}
    report("reading an image", in_turn(items, given.rounds), "CPU ms", given.json, 1000)


if __name__ == "__main__":
    main()
