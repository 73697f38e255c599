"""Compares a step of sdtune with that of diffusers' script, in CPU seconds, and the peak memory of both.

    python bench/step.py --work runs/bench --shape tiny
    python bench/step.py --work runs/bench --shape sd15 --resolution 256 --peer ~/diffusers --rounds 2
    python bench/step.py --work runs/bench --shape ddpm --peer ~/diffusers
    python bench/step.py --work runs/bench --shape tiny -- --gradient-checkpointing

``--peer`` is a checkout of diffusers, whose examples/text_to_image/train_text_to_image_lora.py is run as it is, or for
`ddpm` its examples/unconditional_image_generation/train_unconditional.py; they need torchvision. LoRA has rank 4 and
batch 1, on the same random base and eight pictures, with the cache of sdtune full; `ddpm` is a network of a million
parameters with batch 8 and a moving average. Words after ``--`` are further options of sdtune. Without the cache
sdtune encodes each picture and caption at each step, as the script does.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import shapes
from harness import in_turn, parser, report, run

from sdtune.models import families

SCRIPT = "examples/text_to_image/train_text_to_image_lora.py"
PIXEL_SCRIPT = "examples/unconditional_image_generation/train_unconditional.py"
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


def of_lora(given: argparse.Namespace, images: Path, side: int, steps: int) -> tuple[list[str], list[str]]:
    """The words of sdtune, and those of the script, that train a LoRA."""
    model = shapes.base(given.shape, given.work)
    own = ["-m", "sdtune", "lora", "--model", model, "--dataset", str(images), "--resolution", str(side)]
    own += ["--train-batch-size", "1", "--steps", str(steps), *QUIET.split()]
    peer = ["--pretrained_model_name_or_path", families.resolve_model(model), "--train_batch_size", "1", "--rank", "4"]
    peer += ["--max_train_steps", str(steps), "--caption_column", "text", "--center_crop"]
    return own, [str((given.peer or Path()) / SCRIPT), *peer, "--checkpointing_steps", "100000"]


def of_pixels(given: argparse.Namespace, images: Path, side: int, steps: int) -> tuple[list[str], list[str]]:
    """The words of sdtune, and those of the script, that train a model of pixels: one step an epoch."""
    own = ["-m", "sdtune", "ddpm", "--dataset", str(images), "--resolution", str(side), *PIXEL_NETWORK.split()]
    own += ["--train-batch-size", str(PIXEL_BATCH), "--steps", str(steps), *QUIET.split()]
    peer = ["--model_config_name_or_path", str(given.work / "run" / "unet"), "--train_batch_size", str(PIXEL_BATCH)]
    peer += ["--num_epochs", str(steps), "--use_ema", "--save_images_epochs", "100000", "--center_crop"]
    peer += ["--save_model_epochs", "100000", "--ddpm_num_inference_steps", "1", "--eval_batch_size", "1"]
    return own, [str((given.peer or Path()) / PIXEL_SCRIPT), *peer, "--checkpointing_steps", "100000"]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True, help="where bases, pictures and runs go")
    made.add_argument("--shape", choices=[*shapes.PIXELS, "ddpm"], default="tiny")
    made.add_argument("--resolution", type=int, help="pixels a side; leave out for the base's own")
    made.add_argument("--steps", type=int, help="of each run; leave out for 40 of tiny and ddpm, and 5 of the others")
    made.add_argument("--bf16", action="store_true")
    made.add_argument("--peer", type=Path, help="a checkout of diffusers; leave out to measure sdtune alone")
    made.add_argument("--no-cache", action="store_true", help="also measure sdtune without its cache")
    made.add_argument("more", nargs="*", help="after --: further options of sdtune, as an arm of its own")
    given = made.parse_args()
    pixels = given.shape == "ddpm"
    side = given.resolution or (PIXEL_SIDE if pixels else shapes.PIXELS[given.shape])
    steps = given.steps or (40 if given.shape in ("tiny", "ddpm") else 5)
    os.environ["SDTUNE_CACHE"] = str(given.work / "cache")
    images = shapes.pictures(given.work / f"pictures-{side}", PICTURES, side)
    own, peer = (of_pixels if pixels else of_lora)(given, images, side, steps)
    precision = "bf16" if given.bf16 else "no"
    own += ["--output-dir", str(given.work / "run"), "--mixed-precision", precision]
    peer += ["--train_data_dir", str(images), "--resolution", str(side), "--output_dir", str(given.work / "peer")]
    peer += ["--mixed_precision", precision, "--dataloader_num_workers", "0"]
    peaks: dict[str, list[int]] = {}
    arms: dict[str, Callable[[], float]] = {}

    def add(name: str, words: list[str], **environment: str) -> None:
        peaks[name] = []
        arms[name] = lambda: seconds_of(words, peaks[name], **environment)

    if given.peer:
        add("diffusers' script", peer, ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    run([*own, "--steps", "1"])  # fills the cache, and says how the network is made
    add("sdtune", own)
    if given.no_cache:
        add("sdtune --no-cache", [*own, "--no-cache"])
    if given.more:
        add(f"sdtune {' '.join(given.more)}", [*own, *given.more])
    batch = PIXEL_BATCH if pixels else 1
    title = f"a step of {given.shape}, {side} px, {'bf16' if given.bf16 else 'fp32'}, batch {batch}"
    report(title, in_turn(arms, given.rounds), "CPU ms", given.json, 1000)
    for name, sizes in peaks.items():
        print(f"peak memory of {name}: {statistics.median(sizes) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
