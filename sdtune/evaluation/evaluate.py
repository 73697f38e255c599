"""``sdtune evaluate``: images against a reference, against their prompts and against their classes.

From Python, a command is `evaluate`; its parts are `features.load_network`, `features.embed` or `features.features_of`,
and `distances.estimates` over `figures`:

    network = load_network("random-conv")
    x, y = embed(samples, network), embed(photos, network)      # pixels [N, C, H, W] in [-1, 1]
    frechet(x, y)                                               # one figure
    estimates(figures, (x, y), resamples=200)                   # all of them, with bootstrapped intervals
"""

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.config.verbs import EvaluateConfig
from sdtune.data import Images
from sdtune.data.cache import digest
from sdtune.evaluation.distances import Estimate, estimates, frechet, kernel_distance, mean, precision_recall
from sdtune.evaluation.features import features_of, load_network, progress
from sdtune.evaluation.inputs import Plan, Samples, apart, enough, known, plan_of, read, samples_of
from sdtune.evaluation.judges import Classifier, Clip
from sdtune.evaluation.plots import Shown, picture
from sdtune.models.vision import device
from sdtune.publish import hub
from sdtune.sampling.sample import sample

INFINITE = float("inf")
RANGES = {
    "frechet": (0.0, INFINITE),
    "kernel": (-INFINITE, INFINITE),
    **dict.fromkeys(("precision", "recall", "class_accuracy"), (0.0, 1.0)),
    "clip_score": (0.0, 2.5),
}
"""Least and greatest value of each figure."""
OWN_NAMES = {"frechet": "fid", "kernel": "kid"}
"""What two of them are called when they are measured in the features of the Inception network of FID, and only then."""


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Measure what ``cfg`` says, write ``evaluation.json`` and ``evaluation.png``, and return what the JSON holds.

    Raises: UserError for whatever cannot be measured, as soon as that can be known.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("sdtune evaluate draws with matplotlib: pip install 'sdtune[evaluate]'")
    network = load_network(cfg.features)
    clip = Clip(cfg.clip_model) if cfg.clip_model else None
    classifier = Classifier(cfg.classifier) if cfg.classifier else None
    reference = read("--reference", cfg.reference, cfg)
    enough(cfg, "--reference", len(reference.rows))
    apart(cfg, "--reference", Path(cfg.reference).expanduser())
    try:
        cfg.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {cfg.output_dir}: cannot be written ({error.strerror})") from error

    def asked(of: Samples | Plan) -> tuple[list[str], list[str]]:
        """What the judges are to look for in each image; UserError where they cannot."""
        enough(cfg, of.option, len(of.prompts))
        wanted = known(of, "class") if classifier else []
        if classifier:
            classifier.check(wanted)
        return known(of, "text") if clip else [], wanted

    if plan := plan_of(cfg):
        asked(plan)  # before it draws, which may take long
        sample(plan.sampling)
    samples = samples_of(plan.sampling.output_dir if plan else Path(cfg.samples).expanduser())
    prompts, classes = asked(samples)

    x, y = features_of(samples.images, network, samples.rows), features_of(reference, network)
    notes = []
    if (few := min(len(x), len(y))) <= x.shape[1]:
        notes.append(
            f"{few} images for {x.shape[1]} features: their covariance has not full rank, so the Fréchet distance is "
            "too large; take more images, or go by the kernel distance"
        )
        hub.warn(notes[0])
    found = with_intervals(cfg, "Intervals", lambda *sets: figures(*sets, neighbours=cfg.neighbours), x, y)
    if clip:
        scores = clip.scores(samples.images, samples.rows, prompts)
        found |= with_intervals(cfg, "Intervals (CLIP)", lambda *s: {"clip_score": mean(*s)}, scores)
    by_class: dict[str, float] = {}
    if classifier:
        right = classifier.right(samples.images, samples.rows, classes)
        found |= with_intervals(cfg, "Intervals (classes)", lambda *r: {"class_accuracy": mean(*r)}, right)
        by_class = {c: float(right[[c == k for k in classes]].mean()) for c in sorted(set(classes))}

    result = {
        "samples": {"name": cfg.samples, "images": len(x), "digest": content(samples.images, samples.rows)},
        "reference": {"name": cfg.reference, "images": len(y), "digest": content(reference, range(len(y)))},
        "features": {"name": network.label, "given": cfg.features, "dimension": x.shape[1], "side": network.side},
        "judges": {"clip_model": cfg.clip_model, "classifier": cfg.classifier},
        "neighbours": cfg.neighbours,
        "resamples": cfg.resamples,
        "seed": cfg.seed,
        "figures": {called(kind, network.label): asdict(e) for kind, e in found.items()},
        "class_accuracy_of": by_class,
        "notes": notes,
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (cfg.output_dir / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    shown = [Shown(called(kind, network.label), kind in OWN_NAMES, e) for kind, e in found.items()]
    picture(x, y, shown, head(result)).save(cfg.output_dir / "evaluation.png")
    return result


def tell(cfg: EvaluateConfig) -> str:
    """The figures as a small table."""
    result = evaluate(cfg)
    lines = [f"{'':<28} {'value':>10}   95 % interval"]
    for name, e in result["figures"].items():
        interval = "" if e["low"] is None else f"{e['low']:.4g} to {e['high']:.4g}"
        lines.append(f"{name:<28} {e['value']:>10.4g}   {interval}".rstrip())
    return "\n".join([head(result), *lines, f"in {cfg.output_dir}: evaluation.json, evaluation.png"])


def head(result: dict[str, Any]) -> str:
    samples, reference = result["samples"], result["reference"]
    return f"{samples['images']} images of {samples['name']} against {reference['images']} of {reference['name']}"


def figures(
    x: Tensor, y: Tensor, n_x: Tensor | None = None, n_y: Tensor | None = None, neighbours: int = 3
) -> dict[str, float]:
    """What features of samples x [n, D] and of a reference y [m, D] tell of the two; see `distances` for n_x, n_y."""
    precision, recall = precision_recall(x, y, neighbours, n_x, n_y)
    return {
        "frechet": frechet(x, y, n_x, n_y),
        "kernel": kernel_distance(x, y, n_x, n_y),
        "precision": precision,
        "recall": recall,
    }


def content(images: Images, rows: Iterable[int]) -> str:
    """A digest of the pixels' files, whatever they are called and wherever they lie."""
    return digest(*sorted(images.rows[i].sha256 for i in rows))


def called(kind: str, label: str) -> str:
    """The name of a figure, which for distances tells the network."""
    if kind not in OWN_NAMES:
        return kind
    return OWN_NAMES[kind] if label == "inception" else f"{kind}_{label.replace('-', '_')}"


def with_intervals(cfg: EvaluateConfig, title: str, measure: Any, *sets: Tensor) -> dict[str, Estimate]:
    with progress() as bar:
        task = bar.add_task(title, total=cfg.resamples)
        on_device = [s.double().to(device()) for s in sets]
        found = estimates(measure, on_device, cfg.resamples, cfg.seed, lambda: bar.advance(task))
    return {kind: within(e, *RANGES[kind]) for kind, e in found.items()}


def within(e: Estimate, least: float, greatest: float) -> Estimate:
    """The interval cut at the ends of what the figure can be."""
    if e.low is None or e.high is None:
        return e
    return Estimate(e.value, max(e.low, least), min(e.high, greatest))
