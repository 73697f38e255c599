"""The model card of a run: what was trained, how to use it, how to make it again.

Made anew each time from the run's folder, so that no line of an older card survives. What is not known is left out,
never guessed. No path of this machine is in it: local models and datasets go by their last name.
"""

import io
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from PIL import Image

from sdtune.config import parsing
from sdtune.publish.redact import may_be_hub_id, settings
from sdtune.run import usage
from sdtune.run.contact_sheet import cells
from sdtune.run.usage import ArtefactKind

FAMILY_TAGS = {
    "StableDiffusionPipeline": ["stable-diffusion", "stable-diffusion-diffusers"],
    "StableDiffusionXLPipeline": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
}
"""Pipeline class of a base to the tags under which the Hub files its adapters."""
MOST_WIDGETS = 8


class Origin(NamedTuple):
    """What the Hub knows of a run's base and data. One is on the Hub only when its name is no folder here."""

    base_on_hub: bool = False
    data_on_hub: bool = False
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def origin_of(api: HfApi | None, cfg: Any) -> Origin:
    """What the Hub says of base and data; without ``api``, only whether their names can be ids."""
    model = getattr(cfg, "model", None)  # a run from scratch has none
    origin = Origin(bool(model) and may_be_hub_id(model), may_be_hub_id(cfg.dataset))
    if api is None:
        return origin
    if origin.data_on_hub:
        origin = origin._replace(data_on_hub=api.repo_exists(cfg.dataset, repo_type="dataset"))
    if not origin.base_on_hub:
        return origin
    try:
        told = api.model_info(model, revision=cfg.revision, timeout=20).card_data
    except (RepositoryNotFoundError, HFValidationError) as error:
        return origin._replace(base_on_hub=isinstance(error, GatedRepoError))
    known = told.to_dict() if told else {}
    license = known.get("license")
    if isinstance(license, list) and len(license) > 1:  # which of them holds is not known here
        license = None
    details = {k: known.get(k) if license else None for k in ("license_name", "license_link")}
    return origin._replace(license=license, **details)


def model_card(
    cfg: Any, out: Path, repo: str | None, origin: Origin, weights: Mapping[str, Path]
) -> tuple[str, dict[str, bytes]]:
    """The card of the run in ``out``, and the pictures it shows beside the sample sheets.

    Args:
        repo: ``user/name`` where it will be; ``None`` when that is not known.
        weights: the artefact's files by their path in the repository.

    Returns:
        Text of README.md, and PNG files by their path in the repository.
    """
    shown, name = settings(cfg), cfg.output_dir.resolve().name
    lines = _lines(out / "metrics.jsonl")
    sheets = sorted((out / "samples").glob("step-*.png"))
    pictures, widget = _widgets(sheets)
    what = usage.artefact_kind(weights)
    task, base, token = _task(what), getattr(shown, "model", None), getattr(cfg, "placeholder_token", None)
    trigger = getattr(cfg, "instance_prompt", None) or token or getattr(cfg, "caption", None)
    holdout = [line["holdout_loss"] for line in lines if isinstance(line.get("holdout_loss"), float)]
    data = ModelCardData(
        base_model=cfg.model if origin.base_on_hub else None,
        base_model_relation=("finetune" if what.pipeline else "adapter") if origin.base_on_hub else None,
        license=cfg.license or origin.license,
        license_name=None if cfg.license else origin.license_name,
        license_link=None if cfg.license else origin.license_link,
        library_name="diffusers",
        pipeline_tag=task,
        tags=_tags(cfg, what, task, origin),
        instance_prompt=trigger,
        widget=widget or None,
        datasets=[cfg.dataset] if origin.data_on_hub else None,
        model_name=name if holdout else None,
        eval_results=_results(shown, task, origin.data_on_hub, holdout[-1]) if holdout else None,
    )
    command = _command(cfg, out)
    trained = f"trained on `{shown.dataset}` with `{shlex.join(command)}`"
    parts = [
        f"# {name}",
        f"{_article(cfg, what)}{_on(cfg, base, what, origin)}, {trained}.",
        "<Gallery />" if widget else "",
        f"## Trigger words\n\nUse `{trigger}` in the prompt." if trigger else "",
        _usage(cfg, base, what, token, origin, repo or f"path/to/{name}", widget),
        _before_after(sheets),
        _training(shown, what, out, lines, holdout),
        _again(shown, command),
        _versions(out),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n", pictures


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


def _task(what: ArtefactKind) -> str:
    """What the Hub files it under."""
    if what.classifier:
        return "image-classification"
    return "text-to-image" if what.takes_text else "unconditional-image-generation"


def _tags(cfg: Any, what: ArtefactKind, task: str, origin: Origin) -> list[str]:
    tags = [task, "diffusers", "diffusers-training"]
    if what.adapter:
        tags += ["dora" if getattr(cfg, "use_dora", False) else "lora", "template:sd-lora"]
    if what.embedding:
        tags.append("textual_inversion")
    if what.pipeline and getattr(cfg, "instance_prompt", None):
        tags.append("dreambooth")
    if what.classifier:
        tags.append("classifier-guidance")
    return [*tags, *FAMILY_TAGS.get(what.pipeline or _pipeline_class(cfg, origin), []), "sdtune"]


def _pipeline_class(cfg: Any, origin: Origin) -> str:
    """From the base's ``model_index.json``, as far as it lies on this machine; a single file is Stable Diffusion."""
    if not getattr(cfg, "model", None):
        return ""
    if cfg.model == "tiny" or cfg.model.endswith(".safetensors"):
        return "StableDiffusionPipeline"
    file: Any = Path(cfg.model).expanduser() / "model_index.json"
    if origin.base_on_hub:
        file = try_to_load_from_cache(cfg.model, "model_index.json", cfg.cache_dir, cfg.revision)
    try:
        return json.loads(Path(file).read_text(encoding="utf-8")).get("_class_name", "")
    except (TypeError, OSError, ValueError):
        return ""


def _article(cfg: Any, what: ArtefactKind) -> str:
    if what.pipeline or what.classifier:
        return f"A `{what.pipeline}`" if what.pipeline else "A classifier of noised images"
    kind = "DoRA" if getattr(cfg, "use_dora", False) else "LoRA"
    adapter = f"A {kind} adapter" + (f" of rank {cfg.rank}" if hasattr(cfg, "rank") else "")
    embedding = "embedding of a new word (textual inversion)"
    if what.embedding:
        return f"{adapter} and the {embedding}" if what.adapter else f"The {embedding}"
    return adapter if hasattr(cfg, "rank") else "Weights"


def _on(cfg: Any, base: str | None, what: ArtefactKind, origin: Origin) -> str:
    """The base that it adapts, or began as."""
    if not base:
        return ""
    revision = f" (revision `{cfg.revision}`)" if cfg.revision else ""
    where = "" if origin.base_on_hub else ", which is not on the Hub"
    return f"{', fine-tuned from' if what.pipeline else ' on'} `{base}`{revision}{where}"


def _command(cfg: Any, out: Path) -> list[str]:
    """The words that train such a run: `sdtune lora`, or `sdtune run FILE.py`, as its record begins."""
    record = out / "config.yaml"
    first = record.read_text(encoding="utf-8").partition("\n")[0] if record.is_file() else ""
    words = shlex.split(first.removeprefix("# ")) if first.startswith("# sdtune run ") else []
    return ["sdtune", "run", Path(words[2]).name] if len(words) > 2 else ["sdtune", cfg.method]


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


def _results(shown: Any, task: str, data_on_hub: bool, loss: float) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=shown.dataset if data_on_hub else "imagefolder",
            dataset_name=shown.dataset,
            metric_type="loss",
            metric_name="Loss of held-out images at fixed timesteps and noise",
            metric_value=round(loss, 6),
        )
    ]


def _usage(
    cfg: Any,
    base: str | None,
    what: ArtefactKind,
    token: str | None,
    origin: Origin,
    repo: str,
    widget: list[dict[str, Any]],
) -> str:
    where, revision = (base, cfg.revision) if origin.base_on_hub else (f"path/to/{base}", None)
    prompt = widget[0]["text"] if widget else "..."
    code = usage.lines(what, repo, cfg.hub_revision, str(where), revision, prompt, token)
    return "\n\n".join(["## Use", f"```python\n{code}\n```", *filter(None, [usage.classes(what)])])


def _before_after(sheets: list[Path]) -> str:
    if not sheets:
        return ""
    told = [(int(sheet.stem.removeprefix("step-")), sheet.name) for sheet in dict.fromkeys((sheets[0], sheets[-1]))]
    figures = [
        f"{'Before' if step == 0 else f'After {step} steps'}:\n\n![samples at step {step}](samples/{name})"
        for step, name in told
    ]
    return "## Samples\n\n" + "\n\n".join(figures)


def _training(shown: Any, what: ArtefactKind, out: Path, lines: list[dict[str, Any]], holdout: list[float]) -> str:
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
    tail = losses[-max(1, len(losses) // 20) :]
    scaled = " times the images per step" if "scale_lr" in shown.model_fields_set and shown.scale_lr else ""
    rows = {
        "Steps": max((line["step"] for line in lines), default=0),
        "Images per step": _group(out),
        "Resolution": shown.resolution,
        "Learning rate": f"{shown.learning_rate:g}{scaled}, {shown.lr_scheduler}",
        "Optimizer": shown.optimizer,
        "Rank, alpha": f"{shown.rank}, {shown.alpha or shown.rank:g}"
        if what.adapter and hasattr(shown, "rank")
        else None,
        "Precision": shown.mixed_precision or "no",
        "Seed": shown.seed,
        "Final loss": f"{sum(tail) / len(tail):.4f}" if tail else None,
        "Loss of held-out images": f"{holdout[-1]:.4f}, from {holdout[0]:.4f}" if holdout else None,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return f"## Training\n\n| | |\n| --- | --- |\n{table}"


def _group(out: Path) -> int | None:
    """Images per optimizer step over all processes, as the newest checkpoint has it."""
    states = sorted((out / "checkpoints").glob("step-*/state.json"))
    try:
        return int(json.loads(states[-1].read_text(encoding="utf-8"))["group"])
    except (IndexError, OSError, ValueError, KeyError):
        return None


def _again(shown: Any, words: list[str]) -> str:
    command = parsing.same_command(shown, words)
    every = parsing.to_yaml(shown)
    return (
        f"The same again:\n\n```sh\n{command}\n```\n\n"
        f"<details><summary>All settings</summary>\n\n```yaml\n{every}```\n\n</details>"
    )


def _versions(out: Path) -> str:
    try:
        facts = yaml.safe_load((out / "environment.json").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return ""
    names = ("sdtune", "python", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
    return "Versions: " + ", ".join(f"{name} {facts[name]}" for name in names if name in facts) + "."


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last one that is still being written is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found
