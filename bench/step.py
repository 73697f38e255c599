"""Compares a step of sdtune with that of other trainers, in CPU seconds, and the peak memory of each.

    python bench/step.py --work runs/bench --shape tiny
    python bench/step.py --work runs/bench --shape sd15 --resolution 256 --peer ~/diffusers --rounds 2 --cold
    python bench/step.py --work runs/bench --shape ddpm --peer ~/diffusers
    python bench/step.py --work runs/bench --shape tiny -- --gradient-checkpointing

``--peer`` is a checkout of diffusers, whose script for the base (bench/peers.py) is run as it is; they need
torchvision. ``--kohya`` is a checkout of sd-scripts, with what its requirements.txt names. LoRA has rank 4 and batch 1,
on the same random base and eight pictures, with the cache of sdtune full; ``--cold`` adds a run that fills it. `ddpm`
is a network of a million parameters with batch 8 and a moving average. Words after ``--`` are further options of
sdtune. Without the cache sdtune encodes each picture and caption at each step, as diffusers' scripts do.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import peers
import shapes
from harness import figures, in_turn, parser, report, run

PIXEL_NETWORK = "--block-out-channels 32 64 64 --layers-per-block 1 --attention-resolutions 8"
PIXEL_SIDE, PIXEL_BATCH, PICTURES = 32, 8, 8
QUIET = "--num-validation-images 0 --overwrite --checkpointing-steps 0 --lr-warmup-steps 0"
TICKS = str(Path(__file__).with_name("ticks.py"))


def clock_of(words: list[str], peaks: list[int], **environment: str) -> list[float]:
    """CPU seconds of a training process at each of its steps; its peak memory is added to ``peaks``."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "ticks.json"
        peaks.append(run([TICKS, str(file), *words], **environment).peak)
        clock: list[float] = json.loads(file.read_text(encoding="utf-8"))
    return clock


def seconds_of(words: list[str], peaks: list[int], **environment: str) -> float:
    """CPU seconds of a step, the median without the first two."""
    clock = clock_of(words, peaks, **environment)
    return statistics.median(after - before for before, after in pairwise(clock[1:]))


def own_words(given: argparse.Namespace, images: Path, side: int) -> list[str]:
    """The words of sdtune."""
    network = PIXEL_NETWORK.split() if given.shape == "ddpm" else ["--model", shapes.base(given.shape, given.work)]
    batch = PIXEL_BATCH if given.shape == "ddpm" else 1
    words = ["-m", "sdtune", "ddpm" if given.shape == "ddpm" else "lora", *network, "--dataset", str(images)]
    words += ["--resolution", str(side), "--train-batch-size", str(batch), "--output-dir", str(given.work / "run")]
    return [*words, "--mixed-precision", "bf16" if given.bf16 else "no", *QUIET.split()]


def peer_words(given: argparse.Namespace, images: Path, side: int, steps: int) -> list[str]:
    """The words of diffusers' script."""
    if given.shape == "ddpm":
        words = peers.pixels(given.peer, given.work / "run" / "unet", images, PIXEL_BATCH)
        words += ["--num_epochs", str(steps)]
    else:
        words = peers.lora(given.peer, given.shape, shapes.base(given.shape, given.work), images, 1)
        words += ["--max_train_steps", str(steps)]
    words += ["--resolution", str(side), "--output_dir", str(given.work / "peer")]
    return [*words, "--mixed_precision", "bf16" if given.bf16 else "no"]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True, help="where bases, pictures and runs go")
    made.add_argument("--shape", choices=[*shapes.PIXELS, "ddpm"], default="tiny")
    made.add_argument("--resolution", type=int, help="pixels a side; leave out for the base's own")
    made.add_argument("--steps", type=int, help="of each run; leave out for 5 of the bases of full size, 40 of others")
    made.add_argument("--bf16", action="store_true")
    made.add_argument("--peer", type=Path, help="a checkout of diffusers; leave out to measure sdtune alone")
    made.add_argument("--kohya", type=Path, help="a checkout of sd-scripts")
    made.add_argument("--cold", action="store_true", help="also measure a run of sdtune that fills its cache")
    made.add_argument("--no-cache", action="store_true", help="also measure sdtune without its cache")
    made.add_argument("more", nargs="*", help="after --: further options of sdtune, as an arm of its own")
    given = made.parse_args()
    side = given.resolution or (PIXEL_SIDE if given.shape == "ddpm" else shapes.PIXELS[given.shape])
    steps = given.steps or (5 if given.shape in shapes.NAMES else 40)
    os.environ["SDTUNE_CACHE"] = str(given.work / "cache")
    images = shapes.pictures(given.work / f"pictures-{side}", PICTURES, side)
    own = [*own_words(given, images, side), "--steps", str(steps)]
    run([*own, "--steps", "1"])  # fills the cache, and says how the network is made
    peaks: dict[str, list[int]] = {}
    arms: dict[str, Callable[[], float]] = {}

    def add(name: str, words: list[str], **environment: str) -> None:
        def measure() -> float:
            shutil.rmtree(given.work / "cold", ignore_errors=True)
            return seconds_of(words, peaks[name], **environment)

        peaks[name], arms[name] = [], measure

    if given.peer:
        words = peer_words(given, images, side, steps)
        add("diffusers' script", words, ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    if given.kohya:
        model, precision = shapes.base(given.shape, given.work), "bf16" if given.bf16 else "no"
        words = peers.kohya(given.kohya, given.shape, model, images, given.work, side, 1)
        words += ["--max_train_steps", str(steps), "--mixed_precision", precision]
        add("sd-scripts", words, ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    add("sdtune", own)
    if given.cold:
        add("sdtune, cold", own, SDTUNE_CACHE=str(given.work / "cold"))
    if given.no_cache:
        add("sdtune --no-cache", [*own, "--no-cache"])
    if given.more:
        add(f"sdtune {' '.join(given.more)}", [*own, *given.more])
    precision, batch = "bf16" if given.bf16 else "fp32", PIXEL_BATCH if given.shape == "ddpm" else 1
    title = f"{given.shape}, {side} px, {precision}, batch {batch}"
    report(f"a step of {title}", in_turn(arms, given.rounds), "CPU ms", given.json, 1000)
    report(f"peak memory of {title}", figures(peaks), "MB", given.json, 1e-6)


if __name__ == "__main__":
    main()
