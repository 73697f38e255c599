"""Whether the step that a score of a run would keep is one that draws better, or copies less, than the last.

python bench/keep_best.py hearts --work runs/keep-best [--seeds 0 1 2] [-n 100] [-- more options of the run]
python bench/keep_best.py five --work runs/keep-best

``hearts`` is `lora/tiny-hearts`, scored every 100 steps, also by a classifier of drawn shapes that is trained first.
The artefacts of the step that is kept, and of the last, draw ``n`` images of held-out captions of hearts, which
`toy_world.read` reads (``concept``). ``five`` trains on five pictures of hearts for 3,000 steps; 16 more are held
out. The options that come last are given to the run. Writes ``scores.json`` beside each run, and prints a table.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import ImageFilter
from transformers import ResNetConfig, ResNetForImageClassification

from sdtune.cli import main as sdtune
from sdtune.config.scores import SCORES, Criterion, score_of
from sdtune.config.verbs import SampleConfig
from sdtune.data import toy_world
from sdtune.data.builtin import ASSETS
from sdtune.evaluation.toy_score import score
from sdtune.models.loading import load_adapters, load_pipeline
from sdtune.run.artefacts import BEST, best
from sdtune.run.metrics_file import read_lines

EVERY = 100
HEARTS = [
    *("--keep-best", "class_accuracy", "--validation-prompt", "a big red heart on a white background"),
    *("a small yellow heart on a blue background", "a big white heart on a black background"),
    *("a small green heart on a pink background", "a big blue heart on a white background"),
    *("a big purple heart on a gray background", "a big green circle on a pink background"),
    "a small red arrow on a white background",
]
FIVE = [
    *("--keep-best", "holdout_loss"),
    *("--steps", "3000", "--num-holdout-images", "16"),
    *("--learning-rate", "1e-3", "--lr-scheduler", "constant_with_warmup"),
    *("--train-batch-size", "5", "--validation-steps", "500", "--checkpointing-steps", "1000"),
    *("--validation-prompt", "a big red heart on a white background", "a small blue heart on a pink background"),
    *("a big green heart on a black background", "a small pink heart on a gray background"),
]


def call(words: Sequence[str]) -> None:
    try:
        sdtune(words)
    except SystemExit as ended:
        if ended.code:
            raise


def train(out: Path, every: int, options: list[str]) -> None:
    words = ["lora", "--config", "lora/tiny-hearts", "--num-holdout-images", "16", "--evaluate-steps", str(every)]
    call([*words, "--output-dir", str(out), *options])


def shapes_classifier(work: Path, steps: int = 400, batch: int = 48) -> Path:
    """A classifier of transformers that tells the drawn shapes apart, hearts and stars among them; its folder."""
    out, shapes = work / "classifier", (*toy_world.SHAPES, *toy_world.NEW_SHAPES)
    if (out / "preprocessor_config.json").exists():
        return out
    torch.manual_seed(0)
    sizes = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], layer_type="basic")
    sizes.id2label = dict(enumerate(shapes))
    sizes.label2id = {shape: k for k, shape in enumerate(shapes)}
    network = ResNetForImageClassification(sizes)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps + 1):
        asked, pictures = drawn(shapes, batch, step)
        network.train(step < steps)
        ended = network(pixel_values=(pictures - 0.5) / 0.5, labels=asked)
        if step == steps:
            right = float((ended.logits.argmax(1) == asked).float().mean())
            print(f"classifier of shapes: {right:.0%} right on new pictures")
            break
        optimizer.zero_grad()
        ended.loss.backward()
        optimizer.step()
        schedule.step()
    network.save_pretrained(out)
    pixels = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (out / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    return out


def drawn(shapes: Sequence[str], n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``n`` numbers of shapes, and pictures [n, 3, 64, 64] in [0, 1] of them, softened as an autoencoder does it."""
    rng = np.random.default_rng([9, seed])
    asked = rng.integers(len(shapes), size=n)
    scenes = [toy_world.random_scene(rng, (shapes[k],), None) for k in asked]
    soft = [toy_world.render(scene).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5))) for scene in scenes]
    pictures = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in soft])
    return torch.from_numpy(asked), pictures + rng.uniform(0, 0.05) * torch.randn_like(pictures)


def figures_of(out: Path) -> dict[int, dict[str, float]]:
    """The scores by step, without their intervals; a step may have several lines."""
    figures: dict[int, dict[str, float]] = {}
    for line in read_lines(out / "metrics.jsonl"):
        found = {name: x for name, x in line.items() if score_of(name) and not name.endswith(("_low", "_high"))}
        if found:
            figures.setdefault(line["step"], {}).update(found)
    return figures


def concept(folder: Path | None, n: int) -> float:
    """Share of ``n`` images that show a heart if one is asked for, with adapters of a folder, or of the base alone."""
    pipeline = load_pipeline(SampleConfig(model="tiny", prompt=["unused"]))
    load_adapters(pipeline, [str(folder)] if folder else [])
    return score(pipeline, n, "heart")[0]["shape"]


def kept(figures: dict[int, dict[str, float]], name: str) -> int:
    """The step that is best by a score."""
    sign = 1 if SCORES[score_of(name) or ""].better == "higher" else -1
    found = [step for step in figures if name in figures[step]]
    return max(found, key=lambda step: (sign * figures[step][name], step))


def run(out: Path, every: int, n: int, options: list[str]) -> dict[str, Any]:
    train(out, every, options)
    figures = figures_of(out)
    last = max(figures)
    chosen, folder = best(out)
    assert folder == out / BEST
    names = [name for name in figures[last] if score_of(name) in get_args(Criterion)]
    shown = {step: concept(of, n) for step, of in {0: None, chosen: folder, last: out}.items()}
    result = {
        "figures": figures,
        "concept": shown,
        "kept": {name: kept(figures, name) for name in names},
        "last": [last, shown[last]],
        "best": [chosen, shown[chosen]],
    }
    (out / "scores.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def table(title: str, result: dict[str, Any]) -> None:
    figures, shown = result["figures"], result["concept"]
    names = list(figures[max(figures)])
    print(f"\n{title}\n| step | concept | " + " | ".join(names) + " |\n" + "| --- " * (len(names) + 2) + "|")
    for step, row in figures.items():
        drawn = f"{shown[step]:.0%}" if step in shown else "-"
        print(f"| {step} | {drawn} | " + " | ".join(f"{row.get(name, float('nan')):.4g}" for name in names) + " |")
    print("best by " + ", ".join(f"{name}: step {step}" for name, step in result["kept"].items()))
    print(f"kept in {BEST}: step {result['best'][0]}, {result['best'][1]:.0%} hearts; last: {result['last'][1]:.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("hearts", "five"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-n", type=int, default=100)
    known, more = parser.parse_known_args()
    more = [word for word in more if word != "--"]
    if known.what == "hearts":
        judge = ["--classifier", str(shapes_classifier(known.work)), *HEARTS, *more]
        for seed in known.seeds:
            out = known.work / f"hearts-{seed}"
            table(f"seed {seed}", run(out, EVERY, known.n, ["--seed", str(seed), *judge]))
    else:
        source, folder = ASSETS / "tiny-hearts", known.work / "five-pictures"
        rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
        hearts = [row for row in rows if row["file_name"].startswith("heart")][:21]
        folder.mkdir(parents=True, exist_ok=True)
        for row in hearts:
            shutil.copy(source / row["file_name"], folder / row["file_name"])
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hearts), encoding="utf-8")
        table("five pictures", run(known.work / "five", 250, known.n, ["--dataset", str(folder), *FIVE, *more]))
