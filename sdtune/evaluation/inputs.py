"""The images that `sdtune evaluate` compares, with prompts and classes: from a folder, or drawn by a model first."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtune.config.fields import flag
from sdtune.config.sections import Captions, Data, OutOfRange, TextEncoding, UserError
from sdtune.config.verbs import EvaluateConfig, SampleConfig
from sdtune.data import Images, load_images
from sdtune.evaluation.features import BATCH
from sdtune.evaluation.scores import least_images
from sdtune.models import families
from sdtune.models.formats import files
from sdtune.models.formats.tensor_file import FILE
from sdtune.models.pixel_models import read_classes
from sdtune.run.rng import generator
from sdtune.run.usage import ATTENTION
from sdtune.sampling.enlarge import is_enlarger
from sdtune.sampling.sample_pixels import of_pixels


class Captioned(Captions, Data):
    """The options that `load_images` needs to read captions."""


@dataclass
class Samples:
    """The images under evaluation: their rows in ``images``, and the prompt and class of each if it has one."""

    images: Images
    rows: list[int]
    prompts: list[str | None]
    classes: list[str | None]
    followed: Sequence[str | None] = ()
    """The image that each followed or edited, if it did."""
    edits: Sequence[tuple[str | None, str | None]] = ()
    """Captions of that image, and of what the edit was to show, if ``prompts.jsonl`` tells them."""
    option: str = "SAMPLES"
    """Option that sets the number of images, for error messages."""
    source: str = "prompts.jsonl of SAMPLES"
    """Where prompts and classes come from, for error messages."""


@dataclass
class Plan:
    """Images to be drawn, with the prompt and class of each."""

    sampling: SampleConfig
    prompts: list[str | None]
    classes: list[str | None]
    option: str = "--num-images"
    source: str = "the model SAMPLES"


def read(option: str, name: str, cfg: EvaluateConfig | None = None, captions: bool = False) -> Images:
    """A folder or dataset; errors name ``option``. Columns and versions in ``cfg`` are those of the reference."""
    columns = ("dataset_config_name", "dataset_revision", "split", "image_column", "caption_column")
    fields = ("follow_links", "first_frame", *(columns if option == "--reference" else ()))
    source = {field: getattr(cfg, field) for field in fields} if cfg else {}
    try:
        return load_images(Captioned(dataset=name, resolution=8, **source), captions)
    except UserError as error:
        raise UserError(str(error).replace("--dataset", option, 1)) from error


def samples_of(folder: Path, cfg: EvaluateConfig | None = None) -> Samples:
    """The images of a folder that its ``prompts.jsonl`` lists, with their prompts and classes.

    Without that file: all images of the folder, and the class of each is the name of its own folder.
    """
    images = read("SAMPLES", str(folder), cfg)
    by_name = {row.name: k for k, row in enumerate(images.rows)}
    file = folder / "prompts.jsonl"
    if not file.is_file():
        classes = [row.name.split("/")[-2] if "/" in row.name else None for row in images.rows]
        return Samples(images, list(by_name.values()), [None] * len(by_name), classes)
    entries: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None:
                entries[entry["file_name"]] = entry
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{file}:{number}: not JSON with a file_name") from None
    if missing := [name for name in entries if name not in by_name]:
        raise UserError(f"{file}: names {missing[0]}, which does not exist ({len(missing)} of {len(entries)})")
    return Samples(
        images,
        [by_name[name] for name in entries],
        [entry.get("text") or None for entry in entries.values()],
        [None if entry.get("class") is None else str(entry["class"]) for entry in entries.values()],
        [str(entry["image"]) if entry.get("image") else None for entry in entries.values()],
        [(entry.get("text_before"), entry.get("text_after")) for entry in entries.values()],
    )


def plan_of(cfg: EvaluateConfig) -> Plan | None:
    """How `sdtune sample` draws from SAMPLES if it is a model; None if it is a folder of images.

    A text-to-image model draws ``num_images`` with the reference's captions in a seeded order. A model with classes
    draws as many of each class, rounded up.
    """
    folder, out = Path(cfg.samples).expanduser(), cfg.output_dir / "samples"
    pipeline = (folder / "model_index.json").is_file()
    adapter = (folder / FILE).is_file() or (folder / ATTENTION).is_file() or is_adapter(folder)
    if folder.is_dir() and not pipeline and not adapter:
        if cfg.steps:
            raise UserError(f"--steps: {cfg.samples} is a folder of images, which are there already; leave it out")
        check_output_outside(cfg, "SAMPLES", folder)
        named = ("steps", "guidance_scale", "out_of_range", *TextEncoding.model_fields)
        if drawn := [name for name in named if getattr(cfg, name)]:
            raise UserError(
                f"{flag(drawn[0])}: for images that are drawn, and SAMPLES is a folder of them; leave it out"
            )
        if (folder / "metrics.jsonl").is_file():  # its previews are sheets, which would count as images
            raise UserError(f"SAMPLES {cfg.samples}: this run has no model that draws; give a folder of images")
        return None
    model = None if adapter and not pipeline else str(folder) if folder.is_dir() else cfg.samples
    classes = classes_of_pixels(model) if model else None
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: has samples already; evaluate that folder, or give another --output-dir")
    chosen = {
        "steps": next(iter(cfg.steps), None),
        "guidance_scale": cfg.guidance_scale,
        "seed": cfg.seed,
        "output_dir": out,
    }
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options |= {"model": model} if model else {"adapter": [str(folder)]}
    options |= {name: value for name in TextEncoding.model_fields if (value := getattr(cfg, name))}
    if cfg.out_of_range:
        options |= {name: getattr(cfg, name) for name in OutOfRange.model_fields}
    if classes is None:
        prompts = captions(cfg)
        return Plan(SampleConfig(prompt=prompts, **options), [*prompts], [None] * len(prompts))
    each = math.ceil(cfg.num_images / max(1, len(classes)))
    names = [name for name in classes or [None] for _ in range(each)]
    options |= {"classes": classes, "num_images_per_prompt": each, "batch_size": BATCH}
    return Plan(SampleConfig(**options), names, names)


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter that `sdtune sample` takes: a file of low-rank changes, or PEFT's folder."""
    if path.is_dir():
        return bool(files.peft_folders(path))
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return any("lora" in name or "hada_" in name or "lokr_" in name for name in families.tensor_names(path))


def classes_of_pixels(model: str) -> list[str] | None:
    """The names in ``classes.json`` of a pixel model, empty without that file; None for a text-to-image model."""
    try:
        source = families.resolve_model(model)
        index = families.model_index(source, SampleConfig(model=source))
    except UserError as error:
        why = str(error).removeprefix(f"--model {model}: ")
        raise UserError(
            f"SAMPLES {model}: {why if why.startswith('no such') else f'no such folder, and as a Hub id: {why}'}"
        ) from error
    if is_enlarger(index):
        raise UserError(f"SAMPLES {model}: enlarges images, and draws none; give a folder of what it enlarged")
    return (read_classes(source, f"SAMPLES {model}") or []) if of_pixels(index) else None


def captions(cfg: EvaluateConfig) -> list[str]:
    """``num_images`` of the reference's captions in a seeded order, repeated if there are fewer."""
    found = [row.captions[0] for row in read("--reference", cfg.reference, cfg, captions=True).rows]
    order = torch.randperm(len(found), generator=generator(cfg.seed, "captions")).tolist()
    return [found[order[k % len(order)]] for k in range(cfg.num_images)]


# ---- checks --------------------------------------------------------------------------------------------


def check_output_outside(cfg: EvaluateConfig, option: str, folder: Path) -> None:
    """UserError if the output folder is inside a folder of images, where the next call would count it."""
    if folder.is_dir() and cfg.output_dir.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--output-dir {cfg.output_dir}: is inside {option}, among its images; give another folder")


def check_count(cfg: EvaluateConfig, option: str, count: int) -> None:
    """UserError if a set is too small to have neighbours; resamples need twice as many images."""
    least, wanted = least_images(cfg.neighbours, 0), least_images(cfg.neighbours, cfg.resamples)
    if count < wanted:
        raise UserError(
            f"{option}: {count} images are too few for {cfg.neighbours} neighbours"
            f"{' and intervals' if cfg.resamples else ''}; give at least {wanted}"
            f"{f', or {least} and --resamples 0' if cfg.resamples else ''}"
        )


def followed_by(samples: Samples) -> list[Path]:
    """The image that each sample followed. Raises: UserError if it is not known of one."""
    files = [Path(file) for file in samples.followed if file]
    if len(files) < len(samples.rows):
        raise UserError(
            "--condition: prompts.jsonl of SAMPLES has no `image` for each image; sdtune sample --image writes it"
        )
    return files


def captions_of_edits(samples: Samples) -> tuple[list[str], list[str]]:
    """Captions of the images before and after their edits. Raises: UserError if one is not known."""
    pairs = [(before, after) for before, after in samples.edits if before and after]
    if len(pairs) < len(samples.rows):
        raise UserError(
            "--condition edit: prompts.jsonl of SAMPLES has no `text_before` and `text_after` for each image; "
            "--before and --after on the lines of sdtune sample --prompt-file write them"
        )
    return [before for before, _ in pairs], [after for _, after in pairs]


def values_of(of: Samples | Plan, field: str) -> list[str]:
    """The ``text`` of each image, or its ``class``, for which a prompt stands in; UserError if one has none."""
    values = of.prompts
    if field == "class":
        values = [prompt if own is None else own for own, prompt in zip(of.classes, of.prompts, strict=True)]
    if any(value is None for value in values):
        option = "--classifier" if field == "class" else "--clip-model"
        hint = ", and no folder is named as its class" if field == "class" and isinstance(of, Samples) else ""
        raise UserError(f"{option}: {of.source} has no `{field}` for each image{hint}; leave it out")
    return [value for value in values if value is not None]
