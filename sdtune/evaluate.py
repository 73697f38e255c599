"""``sdtune evaluate``: images against a reference, against their prompts and against their classes.

From Python, a command is `evaluate`; its parts are `features.load_network`, `features.embed` or `features.features_of`,
and `distances.estimates` over `figures`:

    network = load_network("random-conv")
    x, y = embed(samples, network), embed(photos, network)      # pixels [N, C, H, W] in [-1, 1]
    frechet(x, y)                                               # one figure
    estimates(figures, (x, y), resamples=200)                   # all of them, with intervals
"""

import importlib.util
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtune import hub
from sdtune.adapters import FILE
from sdtune.cache import digest
from sdtune.configs import Captions, Data, UserError
from sdtune.data import Images, load_images
from sdtune.distances import Estimate, estimates, frechet, kernel_distance, precision_recall
from sdtune.draws import rng
from sdtune.features import BATCH, features_of, load_network, progress
from sdtune.judges import Classifier, Clip
from sdtune.plots import Shown, picture
from sdtune.sample import sample
from sdtune.sample_pixels import of_pixels
from sdtune.verbs import EvaluateConfig, SampleConfig

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


class Captioned(Captions, Data):
    """What `load_images` reads of a config when it reads captions."""


@dataclass
class Samples:
    """The images under evaluation: which rows of ``images``, and the prompt and class of each where there is one."""

    images: Images
    rows: list[int]
    prompts: list[str | None]
    classes: list[str | None]


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
    samples = samples_of(cfg)
    enough(cfg, "SAMPLES", len(samples.rows))
    prompts = known(samples.prompts, "--clip-model", "text") if clip else []
    classes = known(samples.classes, "--classifier", "class") if classifier else []
    if classifier:
        classifier.check(classes)

    x, y = features_of(samples.images, network, samples.rows), features_of(reference, network)
    notes = []
    if (few := min(len(x), len(y))) <= x.shape[1]:
        notes.append(
            f"{few} images for {x.shape[1]} features: their covariance has not full rank, so the Fréchet distance is "
            "too large; take more images, or go by the kernel distance"
        )
        hub.warn(notes[0])
    found = with_intervals(cfg, "Intervals", lambda x, y: figures(x, y, cfg.neighbours), x, y)
    if clip:
        scores = clip.scores(samples.images, samples.rows, prompts)
        found |= with_intervals(cfg, "Intervals (CLIP)", lambda s: {"clip_score": float(s.mean())}, scores)
    by_class: dict[str, float] = {}
    if classifier:
        right = classifier.right(samples.images, samples.rows, classes)
        found |= with_intervals(cfg, "Intervals (classes)", lambda r: {"class_accuracy": float(r.mean())}, right)
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


def figures(x: Tensor, y: Tensor, neighbours: int = 3) -> dict[str, float]:
    """What features of samples x [n, D] and of a reference y [m, D] tell of the two."""
    precision, recall = precision_recall(x, y, neighbours)
    return {
        "frechet": frechet(x, y),
        "kernel": kernel_distance(x, y),
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with progress() as bar:
        task = bar.add_task(title, total=cfg.resamples)
        on_device = [s.double().to(device) for s in sets]
        found = estimates(measure, on_device, cfg.resamples, cfg.seed, lambda: bar.advance(task))
    return {kind: within(e, *RANGES[kind]) for kind, e in found.items()}


def within(e: Estimate, least: float, greatest: float) -> Estimate:
    """The interval cut at the ends of what the figure can be."""
    if e.low is None or e.high is None:
        return e
    return Estimate(e.value, max(e.low, least), min(e.high, greatest))


# ---- what is measured ----------------------------------------------------------------------------------


def read(option: str, name: str, cfg: EvaluateConfig | None = None, captions: bool = False) -> Images:
    """A folder or dataset; errors name ``option``. What ``cfg`` says of columns and versions is of the reference."""
    fields = ("dataset_config_name", "dataset_revision", "split", "image_column", "caption_column")
    source = {field: getattr(cfg, field) for field in fields} if cfg else {}
    try:
        return load_images(Captioned(dataset=name, resolution=8, **source), captions)
    except UserError as error:
        raise UserError(str(error).replace("--dataset", option, 1)) from error


def samples_of(cfg: EvaluateConfig) -> Samples:
    """The images of SAMPLES, or of the model that it is, with prompts and classes by its ``prompts.jsonl``.

    Without that file all images of the folder count, and the class of each is the name of the folder it lies in.
    """
    folder = Path(cfg.samples).expanduser()
    if not folder.is_dir():
        raise UserError(f"SAMPLES {cfg.samples}: no such folder; give a folder of images, a model or a run")
    if any((folder / name).is_file() for name in ("model_index.json", FILE)):
        folder = sampled(cfg, folder)
    else:
        apart(cfg, "SAMPLES", folder)
    images = read("SAMPLES", str(folder))
    by_name = {row.name: k for k, row in enumerate(images.rows)}
    file = folder / "prompts.jsonl"
    if not file.is_file():
        classes = [row.name.split("/")[-2] if "/" in row.name else None for row in images.rows]
        return Samples(images, list(by_name.values()), [None] * len(by_name), classes)
    told: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None:
                told[entry["file_name"]] = entry
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: not JSON with a file_name") from None
    if missing := [name for name in told if name not in by_name]:
        raise UserError(f"{file}: names {missing[0]}, which is not there ({len(missing)} of {len(told)})")
    return Samples(
        images,
        [by_name[name] for name in told],
        [entry.get("text") or None for entry in told.values()],
        [None if entry.get("class") is None else str(entry["class"]) for entry in told.values()],
    )


def apart(cfg: EvaluateConfig, option: str, folder: Path) -> None:
    """UserError when what is written would count as an image the next time."""
    if folder.is_dir() and cfg.output_dir.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--output-dir {cfg.output_dir}: lies in {option}, among its images; name another folder")


def enough(cfg: EvaluateConfig, option: str, count: int) -> None:
    """UserError when a set is too small to have neighbours, in its halves as well if there are intervals."""
    least = max(2, cfg.neighbours + 1)
    wanted = 2 * least if cfg.resamples else least
    if count < wanted:
        raise UserError(
            f"{option}: {count} images are too few for {cfg.neighbours} neighbours"
            f"{' and intervals' if cfg.resamples else ''}; give at least {wanted}"
            f"{f', or {least} and --resamples 0' if cfg.resamples else ''}"
        )


def known(values: list[str | None], option: str, field: str) -> list[str]:
    """``values``, none of which may be missing."""
    if any(value is None for value in values):
        beside = ", and no folder is named as its class" if field == "class" else ""
        raise UserError(f"{option}: prompts.jsonl of SAMPLES has no `{field}` for each image{beside}; leave it out")
    return [value for value in values if value is not None]


def sampled(cfg: EvaluateConfig, model: Path) -> Path:
    """The folder of images that `sdtune sample` makes of a model or of a run's adapter.

    ``num_images`` with the reference's captions, in an order drawn by the seed; of a model with classes as many of
    each, rounded up.
    """
    out = cfg.output_dir / "samples"
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: has samples already; evaluate that folder, or name another --output-dir")
    chosen = {"steps": cfg.steps, "guidance_scale": cfg.guidance_scale}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    index = model / "model_index.json"
    options |= {"model": str(model)} if index.is_file() else {"adapter": [str(model)]}
    if index.is_file() and of_pixels(json.loads(index.read_text(encoding="utf-8"))):
        file = model / "classes.json"
        classes = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        each = math.ceil(cfg.num_images / max(1, len(classes)))
        options |= {"classes": classes, "num_images_per_prompt": each, "batch_size": BATCH}
    else:
        captions = [row.captions[0] for row in read("--reference", cfg.reference, cfg, captions=True).rows]
        order = torch.randperm(len(captions), generator=rng(cfg.seed, "captions")).tolist()
        options["prompt"] = [captions[order[k % len(order)]] for k in range(cfg.num_images)]
    sample(SampleConfig(**options, seed=cfg.seed, output_dir=out))
    return out
