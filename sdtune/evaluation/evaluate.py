"""``sdtune evaluate``: compares images with a reference, with their prompts and with their classes.

From Python, the command is `evaluate`; its parts are `features.load_network`, `features.embed` or
`features.features_of`, and `distances.estimates` over `scores.figures`:

    network = load_network("random-conv")
    x, y = embed(samples, network), embed(photos, network)      # pixels [N, C, H, W] in [-1, 1]
    frechet(x, y)                                               # one figure
    estimates(figures, (x, y), resamples=200)                   # all of them, with bootstrapped intervals
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sdtune.config.scores import SCORES, score_name
from sdtune.config.sections import UserError
from sdtune.config.verbs import EvaluateConfig
from sdtune.data import Images
from sdtune.data.cache import digest
from sdtune.evaluation.agreement import edge_overlaps, edit_directions
from sdtune.evaluation.bound import measure
from sdtune.evaluation.features import features_of, load_network, progress
from sdtune.evaluation.inputs import (
    Plan,
    Samples,
    captions_of_edits,
    check_count,
    check_output_outside,
    followed_by,
    plan_of,
    read,
    samples_of,
    values_of,
)
from sdtune.evaluation.judges import Classifier, Clip
from sdtune.evaluation.plots import Row, draw, draw_by_steps
from sdtune.evaluation.scores import Bootstrap, figures, mean_of, of_copies, of_subject
from sdtune.publish import hub
from sdtune.run.device import less_memory_with
from sdtune.sampling.sample import sample


@dataclass(frozen=True)
class Judges:
    """The networks that one evaluation asks."""

    features: nn.Module
    clip: Clip | None
    classifier: Classifier | None

    def questions(self, cfg: EvaluateConfig, of: Samples | Plan) -> tuple[list[str], list[str]]:
        """The prompt and the class to look for in each image; both empty where no judge asks for them.

        Raises:
            UserError: there are too few images, or a judge has no prompt or class to look for.
        """
        check_count(cfg, of.option, len(of.prompts))
        judge = self.classifier
        classes = [judge.names[judge.class_of(asked)] for asked in values_of(of, "class")] if judge else []
        return values_of(of, "text") if self.clip else [], classes


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Measure what ``cfg`` asks for; write ``evaluation.json`` and ``evaluation.svg``, and return the JSON's content.

    Raises:
        UserError: something cannot be measured; raised as soon as it can be known.
    """
    judges = load_judges(cfg)
    reference = read("--reference", cfg.reference, cfg)
    validate(cfg, reference)
    with less_memory_with(["`sdtune sample --batch-size 1`, whose folder is then SAMPLES"]):
        samples = collect(cfg, judges)
    prompts, classes = judges.questions(cfg, samples)
    followed = followed_by(samples) if cfg.condition else []
    captions = captions_of_edits(samples) if cfg.condition == "edit" else None
    overlaps = edge_overlaps(samples.images, samples.rows, followed) if cfg.condition == "edges" else None
    x = features_of(samples.images, judges.features, samples.rows)
    y = features_of(reference, judges.features)
    trained_on = features_of(read("--trained-on", cfg.trained_on, cfg), judges.features) if cfg.trained_on else None
    clip_scores, directions, right, by_class = None, None, None, {}
    if judges.clip:
        seen = features_of(samples.images, judges.clip.network, samples.rows)
        clip_scores = judges.clip.scores(seen, prompts)
        directions = edit_directions(judges.clip, seen, followed, *captions) if captions else None
    if judges.classifier:
        logits = features_of(samples.images, judges.classifier.network, samples.rows)
        right = judges.classifier.right(logits, classes)
        by_class = {c: float(right[[c == k for k in classes]].mean()) for c in sorted(set(classes))}
    with progress() as bar:
        task = bar.add_task("Intervals", total=None)
        bootstrap = Bootstrap(cfg.resamples, cfg.seed, lambda: bar.advance(task))
        found = bootstrap(lambda *s: figures(*s, neighbours=cfg.neighbours), x, y) | bootstrap(of_subject, x, y)
        if trained_on is not None:
            found |= of_copies(x, trained_on, y, bootstrap)
        if clip_scores is not None:
            found |= mean_of("clip_score", clip_scores, bootstrap)
        if overlaps is not None:
            found |= mean_of("edge_overlap", overlaps, bootstrap)
        if directions is not None:
            found |= mean_of("edit_direction", directions, bootstrap)
        if right is not None:
            found |= mean_of("class_accuracy", right, bootstrap)
    network = judges.features
    result = {
        "samples": described(cfg.samples, samples.images, samples.rows),
        "reference": described(cfg.reference, reference, range(len(y))),
        "features": {"name": network.label, "given": cfg.features, "dimension": x.shape[1], "side": network.side},
        "judges": {"clip_model": cfg.clip_model, "classifier": cfg.classifier, "trained_on": cfg.trained_on},
        "neighbours": cfg.neighbours,
        "resamples": cfg.resamples,
        "seed": cfg.seed,
        "figures": {score_name(kind, network.label): asdict(e) for kind, e in found.items()},
        "class_accuracy_of": by_class,
        "notes": warnings_of(min(len(x), len(y)), x.shape[1]),
    }
    rows = [Row(score_name(kind, network.label), SCORES[kind].better, e) for kind, e in found.items()]
    write(cfg.output_dir, result, draw(x, y, rows, heading(result)))
    return result


def load_judges(cfg: EvaluateConfig) -> Judges:
    return Judges(
        load_network(cfg.features),
        Clip(cfg.clip_model) if cfg.clip_model else None,
        Classifier(cfg.classifier) if cfg.classifier else None,
    )


def validate(cfg: EvaluateConfig, reference: Images) -> None:
    """Check what can be known before any image is drawn or read; makes the output folder.

    Raises:
        UserError: too few images in the reference, or an output folder among them or that cannot be written.
    """
    check_count(cfg, "--reference", len(reference.rows))
    make_output(cfg)


def make_output(cfg: EvaluateConfig) -> None:
    """Make the output folder. Raises: UserError if it is among the images, or cannot be written."""
    check_output_outside(cfg, "--reference", Path(cfg.reference).expanduser())
    try:
        cfg.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {cfg.output_dir}: cannot be written ({error.strerror})") from error


def collect(cfg: EvaluateConfig, judges: Judges) -> Samples:
    """The images under evaluation. If SAMPLES is a model, it draws them, after the judges' questions are checked."""
    if plan := plan_of(cfg):
        if cfg.condition:
            raise UserError("--condition: SAMPLES is a model; give a folder that sdtune sample --image has filled")
        judges.questions(cfg, plan)
        sample(plan.sampling)
        return samples_of(plan.sampling.output_dir)
    return samples_of(Path(cfg.samples).expanduser(), cfg)


def described(name: str, images: Images, rows: Sequence[int]) -> dict[str, Any]:
    """A set of images in the result; the digest depends on the contents of the files, not on their names."""
    return {"name": name, "images": len(rows), "digest": digest(*sorted(images.rows[i].sha256 for i in rows))}


def warnings_of(images: int, dimension: int) -> list[str]:
    """Sentences on what limits the figures, which are printed too."""
    if images > dimension:
        return []
    note = (
        f"{images} images for {dimension} features: their covariance has not full rank, so the Fréchet distance is "
        "too large; take more images, or go by the kernel distance"
    )
    hub.warn(note)
    return [note]


def write(folder: Path, result: dict[str, Any], picture: str) -> None:
    write_json(folder, result)
    (folder / "evaluation.svg").write_text(picture, encoding="utf-8")


def write_json(folder: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def main(cfg: EvaluateConfig) -> str:
    """The figures as a small table; of several numbers of steps, a line for each."""
    if cfg.bound:
        return bound_alone(cfg)
    with less_memory_with(["a smaller network as --features"]):
        if len(cfg.steps) > 1:
            return compare_steps(cfg)
        result = evaluate(cfg)
    lines = table_of(result["figures"])
    return "\n".join([heading(result), *lines, f"in {cfg.output_dir}: evaluation.json, evaluation.svg"])


def bound_alone(cfg: EvaluateConfig) -> str:
    """The variational bound as such a table; writes ``evaluation.json``."""
    make_output(cfg)
    found, count = measure(cfg)
    asked = {"model": cfg.samples, "reference": cfg.reference, "images": count, "levels": cfg.levels}
    figures_of = {name: asdict(e) for name, e in found.items()}
    write_json(cfg.output_dir, asked | {"resamples": cfg.resamples, "seed": cfg.seed, "figures": figures_of})
    title = f"{cfg.samples} on {count} images of {cfg.reference} with {cfg.levels} levels: bits a dimension"
    return "\n".join([title, *table_of(figures_of), f"in {cfg.output_dir}: evaluation.json"])


def table_of(figures_of: dict[str, Any]) -> list[str]:
    """Lines of names, values and intervals."""
    lines = [f"{'':<28} {'value':>10}   95 % interval"]
    for name, e in figures_of.items():
        interval = "" if e["low"] is None else f"{e['low']:.4g} to {e['high']:.4g}"
        lines.append(f"{name:<28} {e['value']:>10.4g}   {interval}".rstrip())
    return lines


def compare_steps(cfg: EvaluateConfig) -> str:
    """Evaluate a model at each of several numbers of steps, in a folder each; the table, which is written as well."""
    results = {}
    for steps in dict.fromkeys(cfg.steps):
        one = {"steps": [steps], "output_dir": cfg.output_dir / f"steps-{steps}"}
        results[steps] = evaluate(cfg.model_copy(update=one))
    names = [*next(iter(results.values()))["figures"]]
    table = {steps: result["figures"] for steps, result in results.items()}
    title = f"{cfg.samples} against {cfg.reference}"
    write(cfg.output_dir, {"samples": cfg.samples, "by_steps": table}, draw_by_steps(table, title))
    lines = ["steps  " + "  ".join(f"{name:>20}" for name in names)]
    for steps, figures_of in table.items():
        lines.append(f"{steps:>5}  " + "  ".join(f"{figures_of[name]['value']:>20.4g}" for name in names))
    return "\n".join([title, *lines, f"in {cfg.output_dir}: evaluation.json, evaluation.svg, and a folder for each"])


def heading(result: dict[str, Any]) -> str:
    samples, reference = result["samples"], result["reference"]
    return f"{samples['images']} images of {samples['name']} against {reference['images']} of {reference['name']}"
