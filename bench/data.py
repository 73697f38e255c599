"""Measures what a dataset costs by its size: a second start up to the first step, and one item.

    python bench/data.py --work runs/bench-data --images 100 1000 10000

Pictures of the toy world with captions of their own, 32 px, on `tiny`; nothing is cached but what a start remembers of
the pictures, so that encoding does not count. The first start of each size is not measured.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import shapes
from harness import in_turn, parser, report, run

from sdtune.config.methods.lora import LoraConfig
from sdtune.data import open_images, open_stream


def seconds_of_an_item(folder: Path, side: int, count: int = 100) -> Callable[[], float]:
    """CPU seconds of reading an image, in the order of a run."""
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
    os.environ["SDTUNE_CACHE"] = str(given.work / "cache")
    folders = {count: shapes.pictures(given.work / f"pictures-{count}", count, 32) for count in given.images}

    def start(folder: Path) -> float:
        words = ["-m", "sdtune", *"lora --model tiny --resolution 32 --no-cache".split(), "--dataset", str(folder)]
        words += ["--steps", "1", "--num-validation-images", "0", "--overwrite", "--dataloader-num-workers", "0"]
        return run([*words, "--output-dir", str(given.work / "run")]).cpu

    for folder in folders.values():
        start(folder)
    starts = {f"{count:,} images": (lambda folder=folder: start(folder)) for count, folder in folders.items()}
    report("a second start, to the end of step 1", in_turn(starts, given.rounds), "CPU s", given.json)
    items = {f"{count:,} images": seconds_of_an_item(folder, 32) for count, folder in folders.items()}
    report("reading an image", in_turn(items, given.rounds), "CPU ms", given.json, 1000)


if __name__ == "__main__":
    main()
