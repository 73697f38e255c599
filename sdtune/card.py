"""The model card of a run: what was trained, how to use it, how to make it again.

Made anew each time from the run's folder, so that no line of an older card survives. What is not known is left out,
never guessed. No path of this machine is in it: local models and datasets go by their last name.
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from PIL import Image

from sdtune import options
from sdtune.configs import Hub
from sdtune.hub import Files
from sdtune.sheets import cells

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
    origin = Origin(_may_be_hub_id(cfg.model), _may_be_hub_id(cfg.dataset))
    if api is None:
        return origin
    if origin.data_on_hub:
        origin = origin._replace(data_on_hub=api.repo_exists(cfg.dataset, repo_type="dataset"))
    if not origin.base_on_hub:
        return origin
    try:
        told = api.model_info(cfg.model, revision=cfg.revision, timeout=20).card_data
    except (RepositoryNotFoundError, HFValidationError) as error:
        return origin._replace(base_on_hub=isinstance(error, GatedRepoError))
    known = told.to_dict() if told else {}
    license = known.get("license")
    if isinstance(license, list) and len(license) > 1:  # which of them holds is not known here
        license = None
    details = {k: known.get(k) if license else None for k in ("license_name", "license_link")}
    return origin._replace(license=license, **details)


def model_card(cfg: Any, out: Path, repo: str | None, origin: Origin, weights: Files) -> tuple[str, dict[str, bytes]]:
    """The card of the run in ``out``, and the pictures it shows beside the sample sheets.

    Args:
        repo: ``user/name`` where it will be; ``None`` when that is not known.
        weights: the artefact's files by their path in the repository.

    Returns:
        Text of README.md, and PNG files by their path in the repository.
    """
    shown, name = public(cfg), cfg.output_dir.resolve().name
    lines = _lines(out / "metrics.jsonl")
    sheets = sorted((out / "samples").glob("step-*.png"))
    pictures, widget = _widgets(sheets)
    trigger = getattr(cfg, "instance_prompt", None) or cfg.caption
    holdout = [line["holdout_loss"] for line in lines if isinstance(line.get("holdout_loss"), float)]
    data = ModelCardData(
        base_model=cfg.model if origin.base_on_hub else None,
        base_model_relation="adapter" if origin.base_on_hub else None,
        license=cfg.license or origin.license,
        license_name=None if cfg.license else origin.license_name,
        license_link=None if cfg.license else origin.license_link,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=_tags(cfg, origin),
        instance_prompt=trigger,
        widget=widget or None,
        datasets=[cfg.dataset] if origin.data_on_hub else None,
        model_name=name if holdout else None,
        eval_results=_results(shown, origin.data_on_hub, holdout[-1]) if holdout else None,
    )
    model = f"`{shown.model}`" + (f" (revision `{cfg.revision}`)" if cfg.revision else "")
    if not origin.base_on_hub:
        model += ", which is not on the Hub"
    parts = [
        f"# {name}",
        f"{_article(cfg)} on {model}, trained on `{shown.dataset}` with `sdtune {cfg.method}`.",
        "<Gallery />" if widget else "",
        f"## Trigger words\n\nUse `{trigger}` in the prompt." if trigger else "",
        _usage(cfg, shown.model, origin, repo or name, next(iter(weights)), widget),
        _before_after(sheets),
        _training(shown, out, lines, holdout),
        _again(shown),
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


# ---- what may be told --------------------------------------------------------------------------------


def public(cfg: Any) -> Any:
    """``cfg`` without this machine's paths (files and folders by their last name), nor where it was published."""
    fields = type(cfg).model_fields
    changed = {name: fields[name].get_default() for name in ("cache_dir", *Hub.model_fields) if name in fields}
    for name in fields:
        value = getattr(cfg, name)
        if isinstance(value, Path):
            changed.setdefault(name, Path(value.resolve().name))
        elif isinstance(value, str) and _is_path(value, name in ("model", "vae", "dataset")):
            changed[name] = Path(value).name
    return cfg.model_copy(update=changed)


def hide_paths(text: str, cfg: Any) -> str:
    """``text`` with the absolute paths of ``cfg``, and the home folder, as `public` shows them."""
    known = {str(Path.home()): "~", str(cfg.output_dir.resolve()): cfg.output_dir.resolve().name}
    shown = public(cfg)
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        if isinstance(value, Path | str) and Path(value).is_absolute() and getattr(shown, name) != value:
            known[str(value)] = str(getattr(shown, name) or name)
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, known[path]) if len(path) > 1 else text
    return text


def _is_path(text: str, wanted: bool) -> bool:
    """Whether a text is a path of this machine; one that names a model or data is when it looks like one."""
    try:
        return "/" in text and ((wanted and text[0] in "/~.") or Path(text).expanduser().exists())
    except (OSError, ValueError, RuntimeError):  # too long for a path, or no text of one
        return False


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not _is_path(name, True) and not Path(name).parent.is_dir()


# ---- the parts ---------------------------------------------------------------------------------------


def _tags(cfg: Any, origin: Origin) -> list[str]:
    tags = ["text-to-image", "diffusers", "diffusers-training"]
    if hasattr(cfg, "rank"):
        tags += ["dora" if getattr(cfg, "use_dora", False) else "lora", "template:sd-lora"]
    return [*tags, *FAMILY_TAGS.get(_pipeline_class(cfg, origin), []), "sdtune"]


def _pipeline_class(cfg: Any, origin: Origin) -> str:
    """From the base's ``model_index.json``, as far as it lies on this machine; a single file is Stable Diffusion."""
    if cfg.model == "tiny" or cfg.model.endswith(".safetensors"):
        return "StableDiffusionPipeline"
    file: Any = Path(cfg.model).expanduser() / "model_index.json"
    if origin.base_on_hub:
        file = try_to_load_from_cache(cfg.model, "model_index.json", cfg.cache_dir, cfg.revision)
    try:
        return json.loads(Path(file).read_text(encoding="utf-8")).get("_class_name", "")
    except (TypeError, OSError, ValueError):
        return ""


def _article(cfg: Any) -> str:
    kind = "DoRA" if getattr(cfg, "use_dora", False) else "LoRA"
    return f"A {kind} adapter of rank {cfg.rank}" if hasattr(cfg, "rank") else "Weights"


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


def _results(shown: Any, data_on_hub: bool, loss: float) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=shown.dataset if data_on_hub else "imagefolder",
            dataset_name=shown.dataset,
            metric_type="loss",
            metric_name="Loss of held-out images at fixed timesteps and noise",
            metric_value=round(loss, 6),
        )
    ]


def _usage(cfg: Any, model: str, origin: Origin, repo: str, weights: str, widget: list[dict[str, Any]]) -> str:
    where = model if origin.base_on_hub else f"path/to/{model}"
    revision = f", revision={json.dumps(cfg.revision)}" if origin.base_on_hub and cfg.revision else ""
    prompt = json.dumps(widget[0]["text"] if widget else "...", ensure_ascii=False)
    at = f", revision={json.dumps(cfg.hub_revision)}" if cfg.hub_revision else ""
    reader = "DiffusionPipeline.from_pretrained"
    if where.endswith(".safetensors"):
        reader = "StableDiffusionPipeline.from_single_file"
    return f"""## Use

```python
from diffusers import {reader.partition(".")[0]}

pipe = {reader}("{where}"{revision})
pipe.load_lora_weights("{repo}", weight_name="{weights}"{at})
image = pipe({prompt}).images[0]
```"""


def _before_after(sheets: list[Path]) -> str:
    if not sheets:
        return ""
    told = [(int(sheet.stem.removeprefix("step-")), sheet.name) for sheet in dict.fromkeys((sheets[0], sheets[-1]))]
    figures = [
        f"{'Before' if step == 0 else f'After {step} steps'}:\n\n![samples at step {step}](samples/{name})"
        for step, name in told
    ]
    return "## Samples\n\n" + "\n\n".join(figures)


def _training(shown: Any, out: Path, lines: list[dict[str, Any]], holdout: list[float]) -> str:
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
    tail = losses[-max(1, len(losses) // 20) :]
    rows = {
        "Steps": max((line["step"] for line in lines), default=0),
        "Images per step": _group(out),
        "Resolution": shown.resolution,
        "Learning rate": f"{shown.learning_rate:g}, {shown.lr_scheduler}",
        "Optimizer": shown.optimizer,
        "Rank, alpha": f"{shown.rank}, {shown.alpha or shown.rank:g}" if hasattr(shown, "rank") else None,
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


def _again(shown: Any) -> str:
    command = options.same_command(shown, ["sdtune", shown.method])
    settings = options.to_yaml(shown)
    return (
        f"The same again:\n\n```sh\n{command}\n```\n\n"
        f"<details><summary>All settings</summary>\n\n```yaml\n{settings}```\n\n</details>"
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
