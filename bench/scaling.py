"""Measures how the throughput of `sdtune lora` grows with processes and with the batch, in wall-clock time an image.

    python bench/scaling.py --work runs/bench --processes 1 2 --batch 1 4
    python bench/scaling.py --work runs/bench --shape sd15 --bf16 --processes 1 2 4 8 --batch 1 4 16

The only benchmark that measures wall-clock time, since processes that wait use none of their CPU: so the machine has to
be quiet. The batch is that of each process.
"""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import shapes
from harness import in_turn, parser, report, run


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True, help="where bases, pictures and runs go")
    made.add_argument("--shape", choices=shapes.PIXELS, default="tiny")
    made.add_argument("--resolution", type=int, help="pixels a side; leave out for the base's own")
    made.add_argument("--bf16", action="store_true")
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    made.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    given = made.parse_args()
    side = given.resolution or shapes.PIXELS[given.shape]
    os.environ["SDTUNE_CACHE"] = str(given.work / "cache")
    words = ["-m", "sdtune", "lora", "--model", shapes.base(given.shape, given.work), "--resolution", str(side)]
    words += ["--dataset", str(shapes.pictures(given.work / f"pictures-{side}", 8, side)), "--overwrite"]
    words += ["--num-validation-images", "0", "--checkpointing-steps", "0", "--log-steps", "1"]
    words += ["--mixed-precision", "bf16" if given.bf16 else "no", "--output-dir", str(given.work / "run")]

    def seconds_an_image(processes: int, batch: int) -> float:
        several = ["--num-processes", str(processes)] if processes > 1 else []
        run([*words, *several, "--train-batch-size", str(batch), "--steps", str(given.steps)])
        lines = (given.work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [rate for line in lines if (rate := json.loads(line).get("images_per_second"))]
        return 1 / statistics.median(rates[2:])

    run([*words, "--train-batch-size", "1", "--steps", "1"])  # fills the cache
    arms: dict[str, Callable[[], float]] = {
        f"{processes} processes, batch {batch}": (lambda p=processes, b=batch: seconds_an_image(p, b))
        for processes in given.processes
        for batch in given.batch
    }
    report(f"an image of {given.shape}, {side} px", in_turn(arms, given.rounds), "wall ms", given.json, 1000)


if __name__ == "__main__":
    main()
