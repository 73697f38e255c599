"""The model card of a run: what was trained, how to use it, how to reproduce it.

It is written from the run's folder each time, so no line of an older card remains. What is unknown is left out, never
guessed. It contains no path of this machine: local models and datasets are shown by the last part of their path.
"""

import io
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from sdtune.config.scores import score_of, title
from sdtune.config.section_base import Description
from sdtune.publish.origin import FAMILY_TAGS, Origin
from sdtune.publish.redact import redact
from sdtune.run import checkpoints, stock_lines, usage
from sdtune.run.artefacts import best
from sdtune.run.base_class import pipeline_class
from sdtune.run.base_license import License
from sdtune.run.contact_sheet import cells
from sdtune.run.folder import sample_sheets, step_of_sheet
from sdtune.run.markdown import code_span, fence, heading
from sdtune.run.metrics_file import read_lines
from sdtune.run.settings import RunSettings
from sdtune.run.usage import ArtefactKind

CONTROL_NAMES = {name: "T2I-Adapter" if part == "adapter" else "ControlNet" for name, part in usage.CONTROLS.items()}
MOST_WIDGETS = 8
LOSS = "Loss of held-out images at fixed timesteps and noise"


def model_card(
    settings: RunSettings, out: Path, repo: str | None, origin: Origin, weights: Mapping[str, Path]
) -> tuple[str, dict[str, bytes]]:
    """The card of the run in ``out``, and the images it shows besides the sample sheets.

    Args:
        repo: ``user/name`` where it will be; ``None`` when that is not known.
        weights: the artefact's files by their path in the repository.

    Returns:
        Text of README.md, and PNG files by their path in the repository.
    """
    shown, about, hub = redact(settings), settings.about, settings.hub
    name, kind = out.resolve().name, usage.artefact_kind(weights)
    base = str(settings.values.get("model") or about.base or "")
    base_class = pipeline_class(base, about.revision, settings.values.get("cache_dir")) if base else ""
    kept = best(out)
    step = kept[0] if kept and any(file.is_relative_to(kept[1]) for file in weights.values()) else None
    lines = [line for line in read_lines(out / "metrics.jsonl") if step is None or line["step"] <= step]
    sheets = [sheet for sheet in sample_sheets(out) if step is None or step_of_sheet(sheet) <= step]
    images, widget = _widgets(sheets)
    task = _task(kind)
    results = _results(shown, task, origin.data_on_hub, lines)
    holdout = [line["holdout_loss"] for line in lines if isinstance(line.get("holdout_loss"), float)]
    data = ModelCardData(
        base_model=about.base if origin.base_on_hub else None,
        base_model_relation=("finetune" if kind.pipeline or kind.autoencoder or kind.clip else "adapter")
        if origin.base_on_hub
        else None,
        license=hub.license or origin.license,
        license_name=None if hub.license else origin.license_name,
        license_link=None if hub.license else origin.license_link,
        library_name="diffusers",
        pipeline_tag=task,
        tags=_tags(settings, kind, task, base_class),
        instance_prompt=about.trigger,
        widget=widget or None,
        datasets=[settings.values["dataset"]] if origin.data_on_hub else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    command = _command(shown, out)
    trained = f"trained on {code_span(str(shown.values.get('dataset')))} with {code_span(shlex.join(command))}"
    parts = [
        heading(name),
        f"{_article(about, kind)}{_on(shown.about, kind, origin)}, {trained}.",
        License(origin.license, origin.license_name, origin.license_link).sentence(),
        "<Gallery />" if widget else "",
        f"## Trigger words\n\nUse {code_span(about.trigger)} in the prompt." if about.trigger else "",
        _usage(shown.about, hub.hub_revision, kind, origin, repo or f"path/to/{name}", widget, base_class),
        _before_after(sheets),
        _training(shown, kind, out, lines, holdout),
        _reproduce(shown, command),
        _versions(out),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n", images


def save(text: str, path: Path) -> None:
    """Write a card, whole or not at all; OSError when it cannot be."""
    new = path.with_name(f".{path.name}")
    try:
        ModelCard(text).save(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


# ---- the parts ---------------------------------------------------------------------------------------


def _task(kind: ArtefactKind) -> str:
    """The pipeline tag, under which the Hub files it."""
    if kind.classifier:
        return "image-classification"
    if kind.clip:
        return "zero-shot-image-classification"
    if kind.control or kind.edits or kind.autoencoder:
        return "image-to-image"
    return "text-to-image" if kind.takes_text else "unconditional-image-generation"


def _tags(settings: RunSettings, kind: ArtefactKind, task: str, base_class: str) -> list[str]:
    tags = [task, "diffusers", "diffusers-training"]
    if kind.adapter:
        tags += [settings.about.adapter.lower() or "lora", "template:sd-lora"]
    if kind.embeddings:
        tags.append("textual_inversion")
    if kind.attention:
        tags.append("custom-diffusion")
    if kind.pipeline:
        tags += settings.about.tags
    if kind.control:
        tags.append(CONTROL_NAMES[kind.control].lower())
    if kind.autoencoder:
        tags.append("autoencoder")
    if kind.clip:
        tags.append("clip")
    if kind.classifier:
        tags.append("classifier-guidance")
    return [*tags, *FAMILY_TAGS.get(kind.pipeline or base_class, []), "sdtune"]


def _article(about: Description, kind: ArtefactKind) -> str:
    if kind.pipeline or kind.classifier:
        return f"A {code_span(kind.pipeline)}" if kind.pipeline else "A classifier of noised images"
    if kind.control:
        return f"A {CONTROL_NAMES[kind.control]}"
    if kind.autoencoder:
        return "An autoencoder (VAE)"
    if kind.clip:
        return "A CLIP of pictures and captions"
    adapter = f"A {about.adapter or 'LoRA'} adapter" + (f" of rank {about.rank}" if about.rank else "")
    if kind.attention:
        words = f" and of {'new words' if len(kind.embeddings) > 1 else 'a new word'}" if kind.embeddings else ""
        return f"Weights of the cross-attention{words} (Custom Diffusion)"
    if kind.embeddings:
        embedding = "embedding of a new word (textual inversion)"
        return f"{adapter} and the {embedding}" if kind.adapter else f"The {embedding}"
    return adapter if about.adapter else "Weights"


def _on(about: Description, kind: ArtefactKind, origin: Origin) -> str:
    """The base that it adapts, or started from."""
    if not about.base:
        return ""
    revision = f" (revision {code_span(about.revision)})" if about.revision else ""
    where = "" if origin.base_on_hub else ", which is not on the Hub"
    return f"{', fine-tuned from' if kind.pipeline else ' on'} {code_span(about.base)}{revision}{where}"


def _command(shown: RunSettings, out: Path) -> list[str]:
    """The words that train such a run: `sdtune lora`, or `sdtune run FILE.py`, as its config.yaml begins."""
    record = out / "config.yaml"
    first = record.read_text(encoding="utf-8").partition("\n")[0] if record.is_file() else ""
    words = shlex.split(first.removeprefix("# ")) if first.startswith("# sdtune run ") else []
    return ["sdtune", "run", Path(words[2]).name] if len(words) > 2 else ["sdtune", shown.method]


def _widgets(sheets: list[Path]) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The images of the last sheet as files of their own, and the entries that show them with their prompts."""
    pictures, widget = {}, []
    if sheets:
        with Image.open(sheets[-1]) as sheet:
            for k, (image, prompt) in enumerate(cells(sheet)[:MOST_WIDGETS]):
                path, data = f"samples/widget-{k}.png", io.BytesIO()
                image.save(data, format="PNG")
                pictures[path] = data.getvalue()
                widget.append({"text": prompt or "-", "output": {"url": path}})
    return pictures, widget


def _results(shown: RunSettings, task: str, data_on_hub: bool, lines: list[dict[str, Any]]) -> list[EvalResult]:
    """The last loss of held-out images, and the last scores."""
    measured: dict[str, float] = {}
    for line in lines:
        measured |= {name: value for name, value in line.items() if score_of(name) and isinstance(value, float)}
    dataset = str(shown.values["dataset"])
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset if data_on_hub else "imagefolder",
            dataset_name=dataset,
            metric_type="loss" if name == "holdout_loss" else name,
            metric_name="Loss of held-out images at fixed timesteps and noise"
            if name == "holdout_loss"
            else title(name),
            metric_value=round(value, 6),
        )
        for name, value in measured.items()
        if not name.endswith(("_low", "_high"))
    ]


def _usage(
    about: Description,
    branch: str | None,
    kind: ArtefactKind,
    origin: Origin,
    repo: str,
    widget: list[dict[str, Any]],
    base_class: str,
) -> str:
    base, revision = (
        (about.base, about.revision) if origin.base_on_hub else (f"path/to/{about.base}" if about.base else "", None)
    )
    prompt = widget[0]["text"] if widget else "..."
    code = stock_lines.lines(
        kind, repo, branch, str(base), revision, prompt, about.token, about.clip_skip, about.long_prompts, base_class
    )
    return "\n\n".join(["## Use", fence(code, "python"), *filter(None, [usage.classes(kind)])])


def _before_after(sheets: list[Path]) -> str:
    if not sheets:
        return ""
    shown = [(step_of_sheet(sheet), sheet.name) for sheet in dict.fromkeys((sheets[0], sheets[-1]))]
    figures = [
        f"{'Before' if step == 0 else f'After {step} steps'}:\n\n![samples at step {step}](samples/{name})"
        for step, name in shown
    ]
    return "## Samples\n\n" + "\n\n".join(figures)


def _training(
    shown: RunSettings, kind: ArtefactKind, out: Path, lines: list[dict[str, Any]], holdout: list[float]
) -> str:
    values, about = shown.values, shown.about
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
    tail = losses[-max(1, len(losses) // 20) :]
    scaled = " times the images per step" if values.get("scale_lr") else ""
    rows = {
        "Steps": max((line["step"] for line in lines), default=0),
        "Images per step": _group(out),
        "Resolution": f"{values['width']} x {values['height']}" if values.get("width") else values.get("resolution"),
        "Learning rate": f"{values['learning_rate']:g}{scaled}, {values.get('lr_scheduler')}",
        "Optimizer": values.get("optimizer"),
        "Rank, alpha": f"{about.rank}, {about.alpha:g}" if kind.adapter and about.rank and about.alpha else None,
        "Precision": values.get("mixed_precision") or "no",
        "Seed": values.get("seed"),
        "Final loss": f"{sum(tail) / len(tail):.4f}" if tail else None,
        "Loss of held-out images": f"{holdout[-1]:.4f}, from {holdout[0]:.4f}" if holdout else None,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return f"## Training\n\n| | |\n| --- | --- |\n{table}"


def _group(out: Path) -> int | None:
    """Images per optimizer step over all processes, as the newest checkpoint has it."""
    saved = checkpoints.found(out / "checkpoints")
    try:
        return int(json.loads((saved[-1] / "state.json").read_text(encoding="utf-8"))["group"])
    except (IndexError, OSError, ValueError, KeyError, RecursionError):
        return None


def _reproduce(shown: RunSettings, words: list[str]) -> str:
    return (
        f"To reproduce it:\n\n{fence(shown.command(words), 'sh')}\n\n"
        f"<details><summary>All settings</summary>\n\n{fence(shown.to_yaml(), 'yaml')}\n\n</details>"
    )


def _versions(out: Path) -> str:
    try:
        facts = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    names = ("sdtune", "python", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
    return "Versions: " + ", ".join(f"{name} {facts[name]}" for name in names if name in facts) + "."
