"""Measures what a command costs before it does anything: help, a mistake, and a run up to its first step.

    python bench/startup.py --rounds 5
    python bench/startup.py --peer ~/diffusers

The first step is that of `tiny` with a cache that is full. ``--peer`` is a checkout of diffusers, whose
examples/text_to_image/train_text_to_image_lora.py tells its own help and takes the same step; it needs torchvision.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import in_turn, parser, report, run
from peers import OF_SD

from sdtune.data.builtin import BUILT_IN
from sdtune.models import families

FIRST_STEP = "lora --model tiny --dataset tiny-hearts --resolution 64 --steps 1 --num-validation-images 0 --overwrite"


def main() -> None:
    made = parser(__doc__, rounds=5)
    made.add_argument("--peer", type=Path, help="a checkout of diffusers; leave out to measure sdtune alone")
    given = made.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["SDTUNE_CACHE"] = f"{work}/cache"
        first = ["-m", "sdtune", *FIRST_STEP.split(), "--output-dir", f"{work}/run"]
        run(first)
        # A mistake ends with exit code 2, which counts as a failure here
        typo = "import sys; from sdtune.cli import main; sys.argv = ['sdtune', 'lora', '--rnak', '4']\n"
        typo += "try:\n    main(sys.argv[1:])\nexcept SystemExit as done:\n    assert done.code == 2\n"
        arms: dict[str, Callable[[], float]] = {}
        if given.peer:
            arms["the script, --help"] = lambda: run([str(given.peer / OF_SD), "--help"]).cpu
            peer = [str(given.peer / OF_SD), "--pretrained_model_name_or_path", families.resolve_model("tiny")]
            peer += ["--train_data_dir", str(BUILT_IN["tiny-hearts"]()), "--caption_column", "text"]
            peer += [*"--resolution 64 --train_batch_size 4 --rank 4 --max_train_steps 1".split()]
            peer += ["--output_dir", f"{work}/peer"]
            offline = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
            arms["the script, one step of tiny"] = lambda: run(peer, **offline).cpu
        arms |= {
            "sdtune --help": lambda: run(["-m", "sdtune", "--help"]).cpu,
            "sdtune lora --help": lambda: run(["-m", "sdtune", "lora", "--help"]).cpu,
            "an option mistyped": lambda: run(["-c", typo]).cpu,
            "a run of one step of tiny": lambda: run(first).cpu,
        }
        report("a command", in_turn(arms, given.rounds), "CPU s", given.json)


if __name__ == "__main__":
    main()
