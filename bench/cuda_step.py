"""Measures the steps of `sdtune lora` on a GPU: each option that makes them faster, with memory and a trace.

    python bench/cuda_step.py --work runs/bench --shape sd15 --bf16
    python bench/cuda_step.py --work runs/bench --shape sdxl --bf16 --peer ~/diffusers

Seconds of a step are wall-clock time, of steps in the middle of a run. The parts of a step are those of its line of
metrics, between marks in the GPU's own queue. ``trace.json`` of the run without further options is for
https://ui.perfetto.dev. Without a GPU nothing is measured, and each row says so.
"""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import shapes
import torch
from harness import in_turn, parser, report, run, table, write
from step import SCRIPT

WAYS = {
    "sdtune": [],
    "sdtune --cuda-graphs": ["--cuda-graphs"],
    "sdtune --compile": ["--compile"],
    "sdtune --gradient-checkpointing": ["--gradient-checkpointing"],
    "sdtune --deterministic": ["--deterministic"],
    "sdtune --no-cache": ["--no-cache"],
}
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
    given = made.parse_args()
    names = [*(["diffusers' script"] if given.peer else []), *WAYS]
    if not torch.cuda.is_available():
        print("\n".join(f"skipped, as there is no GPU: {name}" for name in names))
        return
    side = given.resolution or shapes.PIXELS[given.shape]
    os.environ["SDTUNE_CACHE"] = str(given.work / "cache")
    images = shapes.pictures(given.work / f"pictures-{side}", 8, side)
    model = shapes.base(given.shape, given.work)
    words = ["-m", "sdtune", "lora", "--model", model, "--dataset", str(images), "--resolution", str(side)]
    words += f"--train-batch-size {given.batch} --num-validation-images 0 --overwrite --log-steps 10".split()
    words += ["--checkpointing-steps", "0", "--mixed-precision", "bf16" if given.bf16 else "no"]
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

    def seconds_of_peer() -> float:
        """The difference of two runs, which leaves out what a start takes."""
        peer = [str(given.peer / SCRIPT), "--train_data_dir", str(images), "--resolution", str(side), "--rank", "4"]
        peer += ["--pretrained_model_name_or_path", model, "--train_batch_size", str(given.batch), "--center_crop"]
        peer += ["--output_dir", str(given.work / "peer"), "--mixed_precision", "bf16" if given.bf16 else "no"]
        peer += ["--checkpointing_steps", "100000", "--caption_column", "text"]
        short, long = (run([*peer, "--max_train_steps", str(n)]).wall for n in (10, 10 + given.steps))
        return (long - short) / given.steps

    run([*words, "--steps", "1", "--output-dir", str(given.work / "run")])  # fills the cache
    arms: dict[str, Callable[[], float]] = {"diffusers' script": seconds_of_peer} if given.peer else {}
    arms |= {name: (lambda n=name, m=more: seconds(n, m)) for name, more in WAYS.items()}
    title = f"a step of {given.shape}, {side} px, {'bf16' if given.bf16 else 'fp32'}, batch {given.batch}"
    report(title, in_turn(arms, given.rounds), "wall ms", given.json, 1000)
    rows = [[name, *(f"{share:.1%}" for share in own), f"{peaks[name] / 1e9:.2f} GB"] for name, own in shares.items()]
    print(table(["share of a step", *PARTS, "peak memory"], rows))
    write({"what": "parts of a step", "parts": PARTS, "found": shares, "peak memory": peaks}, given.json)
    run([*words, "--steps", "8", "--profile", "3", "--output-dir", str(given.work / "traced")])
    print(f"trace: {given.work / 'traced' / 'trace.json'}")


if __name__ == "__main__":
    main()
