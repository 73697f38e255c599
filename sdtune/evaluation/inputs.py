"""What `sdtune evaluate` compares: images of a folder or those that a model draws first, with prompts and classes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtune.config.sections import Captions, Data, UserError
from sdtune.config.verbs import EvaluateConfig, SampleConfig
from sdtune.data import Images, load_images
from sdtune.evaluation.features import BATCH
from sdtune.models import families
from sdtune.models.adapters import FILE
from sdtune.models.pixel_models import read_classes
from sdtune.run.rng import generator
from sdtune.sampling.sample_pixels import of_pixels


class Captioned(Captions, Data):
    """What `load_images` reads of a config when it reads captions."""


@dataclass
class Samples:
    """The images under evaluation: which rows of ``images``, and the prompt and class of each where there is one."""

    images: Images
    rows: list[int]
    prompts: list[str | None]
    classes: list[str | None]
    option: str = "SAMPLES"
    """What says how many there are."""
    source: str = "prompts.jsonl of SAMPLES"
    """What says what they show."""


@dataclass
class Plan:
    """Images that are to be drawn, and what each will be asked to show."""

    sampling: SampleConfig
    prompts: list[str | None]
    classes: list[str | None]
    option: str = "--num-images"
    source: str = "the model SAMPLES"


def read(option: str, name: str, cfg: EvaluateConfig | None = None, captions: bool = False) -> Images:
    """A folder or dataset; errors name ``option``. What ``cfg`` says of columns and versions is of the reference."""
    fields = ("dataset_config_name", "dataset_revision", "split", "image_column", "caption_column")
    source = {field: getattr(cfg, field) for field in fields} if cfg else {}
    try:
        return load_images(Captioned(dataset=name, resolution=8, **source), captions)
    except UserError as error:
        raise UserError(str(error).replace("--dataset", option, 1)) from error


def samples_of(folder: Path) -> Samples:
    """The images of a folder, with prompts and classes by its ``prompts.jsonl``.

    Without that file all images of the folder count, and the class of each is the name of the folder it lies in.
    """
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


def plan_of(cfg: EvaluateConfig) -> Plan | None:
    """How `sdtune sample` is to draw from the model that SAMPLES is; none where it is a folder of images.

    ``num_images`` with the reference's captions, in an order drawn by the seed; of a model with classes as many of
    each, rounded up.
    """
    folder, out = Path(cfg.samples).expanduser(), cfg.output_dir / "samples"
    pipeline, adapter = (folder / "model_index.json").is_file(), (folder / FILE).is_file()
    if folder.is_dir() and not pipeline and not adapter:
        apart(cfg, "SAMPLES", folder)
        if (folder / "metrics.jsonl").is_file():  # its previews are sheets, and would count as images
            raise UserError(f"SAMPLES {cfg.samples}: a run that holds no model which draws; give a folder of images")
        return None
    model = None if adapter and not pipeline else str(folder) if folder.is_dir() else cfg.samples
    classes = classes_of_pixels(model) if model else None
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: has samples already; evaluate that folder, or name another --output-dir")
    chosen = {"steps": cfg.steps, "guidance_scale": cfg.guidance_scale, "seed": cfg.seed, "output_dir": out}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options |= {"model": model} if model else {"adapter": [str(folder)]}
    if classes is None:
        prompts = captions(cfg)
        return Plan(SampleConfig(prompt=prompts, **options), [*prompts], [None] * len(prompts))
    each = math.ceil(cfg.num_images / max(1, len(classes)))
    names = [name for name in classes or [None] for _ in range(each)]
    options |= {"classes": classes, "num_images_per_prompt": each, "batch_size": BATCH}
    return Plan(SampleConfig(**options), names, names)


def classes_of_pixels(model: str) -> list[str] | None:
    """What ``classes.json`` of a model of pixels names, empty without that file; none for a model of text to image."""
    try:
        source = families.resolve_model(model)
        where = SampleConfig(model=source)
        if not of_pixels(families.model_index(source, where)):
            return None
    except UserError as error:
        why = str(error).removeprefix(f"--model {model}: ")
        raise UserError(
            f"SAMPLES {model}: {why if why.startswith('no such') else f'no such folder, and as a Hub id: {why}'}"
        ) from error
    return read_classes(source, f"SAMPLES {model}") or []


def captions(cfg: EvaluateConfig) -> list[str]:
    """``num_images`` of the reference's captions, in an order drawn by the seed, again and again if they are fewer."""
    found = [row.captions[0] for row in read("--reference", cfg.reference, cfg, captions=True).rows]
    order = torch.randperm(len(found), generator=generator(cfg.seed, "captions")).tolist()
    return [found[order[k % len(order)]] for k in range(cfg.num_images)]


# ---- what cannot be measured ---------------------------------------------------------------------------


def apart(cfg: EvaluateConfig, option: str, folder: Path) -> None:
    """UserError when what is written would count as an image the next time."""
    if folder.is_dir() and cfg.output_dir.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--output-dir {cfg.output_dir}: lies in {option}, among its images; name another folder")


def enough(cfg: EvaluateConfig, option: str, count: int) -> None:
    """UserError when a set is too small to have neighbours, in its resamples as well if there are intervals."""
    least = max(2, cfg.neighbours + 1)
    wanted = 2 * least if cfg.resamples else least
    if count < wanted:
        raise UserError(
            f"{option}: {count} images are too few for {cfg.neighbours} neighbours"
            f"{' and intervals' if cfg.resamples else ''}; give at least {wanted}"
            f"{f', or {least} and --resamples 0' if cfg.resamples else ''}"
        )


def known(of: Samples | Plan, field: str) -> list[str]:
    """The ``text`` or ``class`` of each image, none of which may be missing."""
    values = of.classes if field == "class" else of.prompts
    if any(value is None for value in values):
        option = "--classifier" if field == "class" else "--clip-model"
        beside = ", and no folder is named as its class" if field == "class" and isinstance(of, Samples) else ""
        raise UserError(f"{option}: {of.source} has no `{field}` for each image{beside}; leave it out")
    return [value for value in values if value is not None]
