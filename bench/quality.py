"""Measures how long training takes to a score: CPU seconds until enough pictures show what was taught.

    python bench/quality.py --work runs/bench-quality
    python bench/quality.py --work runs/bench-quality --peer ~/diffusers -- --optimizer prodigy

`tiny` learns hearts from 24 pictures (recipe lora/tiny-hearts); each copy of the adapter on the way draws as many
hearts as ``--images`` says, and a classifier by rules counts them. Seconds are those of the training process, from its
start to the first copy that reaches ``--score``; drawing is not counted. ``--peer`` is a checkout of diffusers, whose
examples/text_to_image/train_text_to_image_lora.py trains with the same rank, batch, learning rate and steps; it needs
torchvision. Words after ``--`` are further options of sdtune, as an arm of its own.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

from harness import in_turn, parser, report
from peers import OF_SD
from step import clock_of

from sdtune.config.verbs import SampleConfig
from sdtune.data.builtin import BUILT_IN
from sdtune.evaluation.toy_score import score
from sdtune.models import families
from sdtune.models.loading import load_adapters, load_pipeline

RANK, BATCH, RATE = 32, 8, 2e-3


def hearts(adapter: Path, images: int) -> float:
    """Share of pictures that show a heart when one is asked for."""
    pipeline = load_pipeline(SampleConfig(model="tiny", prompt=["unused"]))
    load_adapters(pipeline, [str(adapter)])
    share: float = score(pipeline, images, "heart")[0]["shape"]
    return share


def main() -> None:
    made = parser(__doc__, rounds=1)
    made.add_argument("--work", type=Path, required=True, help="where runs go")
    made.add_argument("--score", type=float, default=0.8, help="share of pictures that show a heart")
    made.add_argument("--images", type=int, default=50)
    made.add_argument("--every", type=int, default=100, help="steps between two copies of the adapter")
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--peer", type=Path, help="a checkout of diffusers; leave out to measure sdtune alone")
    made.add_argument("more", nargs="*", help="after --: further options of sdtune lora")
    given = made.parse_args()
    os.environ["SDTUNE_CACHE"] = str(given.work / "cache")

    def seconds_to_score(words: list[str], copy: Callable[[int], Path], **environment: str) -> float:
        """CPU seconds of the process at the step of the first copy that is good enough; infinite if none is."""
        clock = clock_of(words, [], **environment)
        for step in range(given.every, given.steps + 1, given.every):
            share = hearts(copy(step), given.images)
            print(f"  {share:.0%} after {step} steps, {clock[step - 1]:.1f} s", flush=True)
            if share >= given.score:
                return clock[step - 1]
        return math.inf

    def own(more: list[str]) -> Callable[[], float]:
        out = given.work / "run"
        words = ["-m", "sdtune", "lora", "--config", "lora/tiny-hearts", "--lr-scheduler", "constant", "--overwrite"]
        words += ["--lr-warmup-steps", "0", "--num-validation-images", "0", "--num-holdout-images", "0"]
        words += ["--export-steps", str(given.every), "--steps", str(given.steps), "--output-dir", str(out), *more]
        return lambda: seconds_to_score(words, lambda step: out / "exports" / f"step-{step:06}")

    arms: dict[str, Callable[[], float]] = {}
    if given.peer:
        out = given.work / "peer"
        peer = [str(given.peer / OF_SD), "--train_data_dir", str(BUILT_IN["tiny-hearts"]()), "--resolution", "64"]
        peer += ["--pretrained_model_name_or_path", families.resolve_model("tiny"), "--caption_column", "text"]
        peer += ["--train_batch_size", str(BATCH), "--rank", str(RANK), "--learning_rate", str(RATE), "--center_crop"]
        peer += ["--output_dir", str(out), "--checkpointing_steps", str(given.every)]
        peer += ["--max_train_steps", str(given.steps)]
        arms["diffusers' script"] = lambda: seconds_to_score(
            peer, lambda step: out / f"checkpoint-{step}", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true"
        )
    arms["sdtune"] = own([])
    if given.more:
        arms[f"sdtune {' '.join(given.more)}"] = own(given.more)
    report(f"training until {given.score:.0%} are hearts", in_turn(arms, given.rounds), "CPU s", given.json)


if __name__ == "__main__":
    main()
