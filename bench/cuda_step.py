"""Measures the steps of `sdtune lora` on a GPU: each option that makes them faster, with memory and a trace.

    python bench/cuda_step.py --work runs/bench --shape sd15 --bf16
    python bench/cuda_step.py --work runs/bench --shape sdxl --bf16 --peer ~/diffusers

Seconds of a step are wall-clock time, of steps in the middle of a run. The parts of a step are those of its line of
metrics, between marks in the GPU's own queue. ``trace.json`` of the run without further options is for
https://ui.perfetto.dev. ``--peer`` is a checkout of diffusers, ``--kohya`` one of sd-scripts (bench/peers.py). Without
a GPU only the small shapes are measured, on the CPU, which shows that this works; what needs a GPU is skipped by name.
"""

import json
import os
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peers
import shapes
import torch
from harness import in_turn, parser, report, run, table, write
from step import clock_of

WAYS = {
    "sdtune": [],
    "sdtune --cuda-graphs": ["--cuda-graphs"],
    "sdtune --compile": ["--compile"],
    "sdtune --gradient-checkpointing": ["--gradient-checkpointing"],
    "sdtune --deterministic": ["--deterministic"],
    "sdtune --no-cache": ["--no-cache"],
}
NEED_GPU = ("sdtune --cuda-graphs", "sdtune --compile")
PARTS = ("data_wait", "forward", "backward", "graph", "optimizer", "rest")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True, help="where bases, pictures and runs go")
    made.add_argument("--shape", choices=shapes.PIXELS, default="sd15")
    made.add_argument("--resolution", type=int, help="pixels a side; leave out for the base's own")
    made.add_argument("--bf16", action="store_true")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--peer", type=Path, help="a checkout of diffusers; leave out to measure sdtune alone")
    made.add_argument("--kohya", type=Path, help="a checkout of sd-scripts")
    made.add_argument("--only", default="", help="a regular expression on the ways of sdtune")
    given = made.parse_args()
    gpu = torch.cuda.is_available()
    ways = {name: more for name, more in WAYS.items() if re.search(given.only, name)}
    skipped = [] if gpu else [name for name in ways if given.shape in shapes.NAMES or name in NEED_GPU]
    for name in skipped:
        ways.pop(name)
        print(f"skipped, as there is no GPU: {name}")
    if not ways:
        return
    side = given.resolution or shapes.PIXELS[given.shape]
    os.environ["SDTUNE_CACHE"] = str(given.work / "cache")
    images = shapes.pictures(given.work / f"pictures-{side}", 8, side)
    model = shapes.base(given.shape, given.work)
    words = ["-m", "sdtune", "lora", "--model", model, "--dataset", str(images), "--resolution", str(side)]
    words += f"--train-batch-size {given.batch} --num-validation-images 0 --overwrite".split()
    words += ["--log-steps", str(max(1, given.steps // 6))]
    precision = ["bf16" if given.bf16 else "no"]
    words += ["--checkpointing-steps", "0", "--mixed-precision", *precision]
    shares: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}

    def seconds(name: str, more: list[str]) -> float:
        out = given.work / "run"
        run([*words, *more, "--steps", str(given.steps), "--output-dir", str(out)])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if "images_per_second" in line][2:]
        shares[name] = [statistics.median(line[part] for line in lines) for part in PARTS]
        peaks[name] = max(line["peak_memory"] for line in lines)
        return given.batch / statistics.median(line["images_per_second"] for line in lines)

    def seconds_of_other(more: list[str]) -> float:
        """The mean of the steps after the first quarter; other trainers read the loss of each, so the host waits."""
        environment = {"TICKS": "wall", "HF_HUB_OFFLINE": "1"} | ({} if gpu else {"ACCELERATE_USE_CPU": "true"})
        clock = clock_of([*more, "--max_train_steps", str(given.steps)], [], **environment)
        first = len(clock) // 4
        return (clock[-1] - clock[first]) / (len(clock) - 1 - first)

    arms: dict[str, Callable[[], float]] = {}
    if given.peer:
        peer = [*peers.lora(given.peer, given.shape, model, images, given.batch), "--resolution", str(side)]
        peer += ["--output_dir", str(given.work / "peer"), "--mixed_precision", *precision]
        arms["diffusers' script"] = partial(seconds_of_other, peer)
    if given.kohya:
        other = peers.kohya(given.kohya, given.shape, model, images, given.work, side, given.batch)
        arms["sd-scripts"] = partial(seconds_of_other, [*other, "--mixed_precision", *precision])
    run([*words, "--steps", "1", "--output-dir", str(given.work / "run")])  # fills the cache
    arms |= {name: partial(seconds, name, more) for name, more in ways.items()}
    title = f"a step of {given.shape}, {side} px, {'bf16' if given.bf16 else 'fp32'}, batch {given.batch}"
    report(title, in_turn(arms, given.rounds), "wall ms", given.json, 1000)
    rows = [[name, *(f"{share:.1%}" for share in own), f"{peaks[name] / 1e9:.2f} GB"] for name, own in shares.items()]
    print(table(["share of a step", *PARTS, "peak memory"], rows))
    write({"what": "parts of a step", "parts": PARTS, "found": shares, "peak memory": peaks}, given.json)
    run([*words, "--steps", "8", "--profile", "3", "--output-dir", str(given.work / "traced")])
    print(f"trace: {given.work / 'traced' / 'trace.json'}")


if __name__ == "__main__":
    main()
