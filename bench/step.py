"""Compares a LoRA step of `sdtune lora` with that of diffusers' script, in CPU seconds, and the peak memory of both.

    python bench/step.py --work runs/bench --shape tiny
    python bench/step.py --work runs/bench --shape sd15 --resolution 256 --peer ~/diffusers --rounds 2
    python bench/step.py --work runs/bench --shape tiny -- --gradient-checkpointing

``--peer`` is a checkout of diffusers, whose examples/text_to_image/train_text_to_image_lora.py is run as it is; it
needs torchvision. Both train rank 4 with batch 1 on the same random base and eight pictures, with the cache of sdtune
full. Words after ``--`` are further options of sdtune. Without the cache sdtune encodes each picture and caption at
each step, as the script does.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import shapes
from harness import in_turn, parser, report, run

SCRIPT = "examples/text_to_image/train_text_to_image_lora.py"
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


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True, help="where bases, pictures and runs go")
    made.add_argument("--shape", choices=shapes.PIXELS, default="tiny")
    made.add_argument("--resolution", type=int, help="pixels a side; leave out for the base's own")
    made.add_argument("--steps", type=int, help="of each run; leave out for 40 of tiny and 5 of the others")
    made.add_argument("--bf16", action="store_true")
    made.add_argument("--peer", type=Path, help="a checkout of diffusers; leave out to measure sdtune alone")
    made.add_argument("--no-cache", action="store_true", help="also measure sdtune without its cache")
    made.add_argument("more", nargs="*", help="after --: further options of sdtune lora, as an arm of its own")
    given = made.parse_args()
    side = given.resolution or shapes.PIXELS[given.shape]
    steps = given.steps or (40 if given.shape == "tiny" else 5)
    os.environ["SDTUNE_CACHE"] = str(given.work / "cache")
    images = shapes.pictures(given.work / f"pictures-{side}", 8, side)
    model = shapes.base(given.shape, given.work)
    own = ["-m", "sdtune", "lora", "--model", model, "--dataset", str(images), "--resolution", str(side)]
    own += ["--train-batch-size", "1", "--num-validation-images", "0", "--steps", str(steps), "--overwrite"]
    own += ["--checkpointing-steps", "0", "--output-dir", str(given.work / "run"), "--lr-warmup-steps", "0"]
    own += ["--mixed-precision", "bf16" if given.bf16 else "no"]
    peaks: dict[str, list[int]] = {}
    arms: dict[str, Callable[[], float]] = {}

    def add(name: str, words: list[str], **environment: str) -> None:
        peaks[name] = []
        arms[name] = lambda: seconds_of(words, peaks[name], **environment)

    if given.peer:
        from sdtune.models import families

        peer = [str(given.peer / SCRIPT), "--train_data_dir", str(images), "--resolution", str(side)]
        peer += ["--pretrained_model_name_or_path", families.resolve_model(model), "--train_batch_size", "1"]
        peer += ["--max_train_steps", str(steps), "--output_dir", str(given.work / "peer"), "--rank", "4"]
        peer += ["--mixed_precision", "bf16" if given.bf16 else "no", "--dataloader_num_workers", "0"]
        peer += ["--checkpointing_steps", "100000", "--caption_column", "text", "--center_crop"]
        add("diffusers' script", peer, ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    run([*own, "--steps", "1"])  # fills the cache
    add("sdtune", own)
    if given.no_cache:
        add("sdtune --no-cache", [*own, "--no-cache"])
    if given.more:
        add(f"sdtune {' '.join(given.more)}", [*own, *given.more])
    title = f"a step of {given.shape}, {side} px, {'bf16' if given.bf16 else 'fp32'}, batch 1"
    report(title, in_turn(arms, given.rounds), "CPU ms", given.json, 1000)
    for name, sizes in peaks.items():
        print(f"peak memory of {name}: {statistics.median(sizes) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
