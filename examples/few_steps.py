"""Fifty steps to four, two and one: distils `tiny`, `tiny-flow` and the model of digits, and measures what comes out.

python examples/few_steps.py [lcm] [lcm-lora] [reflow] [progressive] [consistency] [consistency-scratch] [--overwrite]

Comes after `make digits`, whose model is the teacher of digits. Prints what was measured, and ends with 1 if something
is below its bar; the tables are those of docs/few-steps.md. All are trained by two processes of one thread. Of digits
the Frechet distance tells (features of the built-in random network), of `tiny` and `tiny-flow` what a reader of
their shapes and colours sees.
"""

from pathlib import Path

from two_at_a_time import main_of, train

RUNS = {
    "lcm": ("lcm/tiny", "runs/lcm-tiny"),
    "lcm-lora": ("lcm/tiny-lora", "runs/lcm-tiny-lora"),
    "reflow": ("reflow/tiny-flow", "runs/reflow-tiny-flow"),
    "consistency-scratch": ("consistency/digits-scratch", "runs/consistency-digits-scratch"),
    "progressive": ("progressive/digits", "runs/progressive-digits"),
    "consistency": ("consistency/digits", "runs/consistency-digits"),
}
"""Method to its recipe and the folder of its run."""
PARTS = ["lcm lcm-lora", "reflow progressive consistency consistency-scratch"]


def run(method: str, words: list[str]) -> tuple[str, list[str]]:
    """Train a method; its scores as printed, and the names of those that miss their bars."""
    # These import torch and diffusers, which the process that starts the parts can do without.
    from digits import UNCONDITIONAL, table
    from digits import train as train_on_two_cores
    from few_step_scores import MEASURE

    if method in ("progressive", "consistency") and not Path(UNCONDITIONAL, "model_index.json").is_file():
        train_on_two_cores("ddpm", "--config", "ddpm/digits")
    recipe, out = RUNS[method]
    train(recipe, out, words)
    rows = MEASURE[method](Path(out))
    return table(rows), [what for what, _, _, met in rows if not met]


if __name__ == "__main__":
    main_of(__file__, PARTS, run)
