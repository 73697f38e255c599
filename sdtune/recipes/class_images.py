"""Class pictures of DreamBooth's prior preservation: those there are, and as many from the base as are lacking.

Picture k is drawn from its own seed in a batch of fixed members, however many are asked for, whichever process draws
it and however often it was interrupted, so the set is always the same, byte for byte. Each is written beside its place
and renamed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import track

from sdtune.config.methods import DreamBoothConfig
from sdtune.config.sections import UserError
from sdtune.data import Images, load_images
from sdtune.data.images import EXTENSIONS
from sdtune.data.metadata import TABLES
from sdtune.models import families
from sdtune.run import rng
from sdtune.run.processes import store_barrier
from sdtune.sampling.sample import generate

FOLDER = "class-pictures"
MADE = "made-"


def class_images(cfg: DreamBoothConfig, family: Any) -> Images:
    """The class pictures of a run, after the base has made those that are lacking; called by every process.

    Raises:
        UserError: there are too few and nothing to make them from, or they were made with other settings.
    """
    folder = (cfg.class_data or cfg.output_dir / FOLDER).expanduser()
    if family.device.type == "meta" and len(pictures(folder)) < cfg.num_class_images:
        return load_images(cfg, default=cfg.instance_prompt)  # a look makes none: the subject's own stand in for them
    own = [p for p in pictures(folder) if not p.name.startswith(MADE)]
    lacking = cfg.num_class_images - len(own)
    if lacking > 0:
        if PartialState().is_main_process:
            make_ready(cfg, folder, own, lacking)
        store_barrier()
        make(cfg, family, folder, lacking)
    if not (cfg.class_prompt or captioned(folder)):
        raise UserError(
            f"--class-data {folder}: the pictures have no captions; add --class-prompt, which is that of all"
        )
    caption = cfg.class_prompt[0] if cfg.class_prompt else None
    changed = {"dataset": str(folder), "caption": None, "caption_column": None}
    changed["max_train_samples"] = cfg.num_class_images
    return load_images(cfg.model_copy(update=changed), default=caption)


def make_ready(cfg: DreamBoothConfig, folder: Path, own: list[Path], lacking: int) -> None:
    """Make sure that the base may make pictures in a folder; in the run's own, those of other settings go.

    Raises:
        UserError: what stands in the way.
    """
    have = f"--class-data {folder}: {len(own)} of --num-class-images {cfg.num_class_images}"
    if not cfg.class_prompt:
        raise UserError(f"{have}, and nothing to make more from; add --class-prompt, pictures, or ask for fewer")
    if own and len(cfg.class_prompt) > 1:
        raise UserError(
            f"{have}, and it is not said which of the class prompts they show; give one prompt, add pictures, or name "
            "another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--class-data {folder}: cannot be written ({error.strerror})") from None
    wanted = {place(folder, k) for k in range(lacking)}
    for file in [p for p in pictures(folder) if p.name.startswith(MADE)]:
        with Image.open(file) as image:
            made = image.info.get("sdtune", "nothing that is told")
        if cfg.class_data and made != settings(cfg):
            raise UserError(
                f"{file} was made with other settings ({made}); name another --class-data folder, or remove {MADE}*"
            )
        if made != settings(cfg) or file not in wanted:
            file.unlink()
            file.with_suffix(".txt").unlink(missing_ok=True)


def make(cfg: DreamBoothConfig, family: Any, folder: Path, count: int) -> None:
    """Draw pictures 0 to ``count`` of the class, this process its share of what is missing, and wait for the others."""
    state, size = PartialState(), cfg.sample_batch_size
    batches = [range(k, k + size) for k in range(0, count, size)]  # whole ones, whatever the count
    missing = [batch for batch in batches if not all(place(folder, k).exists() for k in batch if k < count)]
    store_barrier()  # all have looked before one draws, so that the shares are of one list
    mine = missing[state.process_index :: state.num_processes]
    bar: dict[str, Any] = {"console": Console(stderr=True), "transient": True}
    for batch in track(mine, f"Class pictures ({count} of them)", disable=not state.is_main_process, **bar):
        prompts = [cfg.class_prompt[k % len(cfg.class_prompt)] for k in batch]
        with torch.autocast(family.device.type, family.dtype, enabled=family.dtype != torch.float32):
            images = generate(
                family.pipeline(),
                prompts,
                [rng.key(cfg.seed, "class picture", k) for k in batch],
                steps=cfg.class_inference_steps,
                guidance_scale=cfg.class_guidance_scale,
                batch_size=size,
                width=cfg.resolution,
                height=cfg.resolution,
            )
        for k, prompt, image in zip(range(batch.start, min(batch.stop, count)), prompts, images, strict=False):
            write(place(folder, k), image, settings(cfg), prompt if len(cfg.class_prompt) > 1 else None)
    if mine:
        family.unload_frozen()
    store_barrier()


def settings(cfg: DreamBoothConfig) -> str:
    """All that a made picture depends on; it carries this itself."""
    names = "revision seed class_prompt sample_batch_size class_inference_steps class_guidance_scale resolution".split()
    told = {"model": families.public_name(cfg.model)} | {name: getattr(cfg, name) for name in names}
    return json.dumps(told, sort_keys=True, ensure_ascii=False)


def pictures(folder: Path) -> list[Path]:
    shown = (p for p in folder.glob("**/*") if not p.name.startswith("."))
    return sorted(p for p in shown if p.suffix.lower() in EXTENSIONS)


def captioned(folder: Path) -> bool:
    """Whether pictures of a folder have captions of their own: a file beside one, or a table."""
    beside = (p.with_suffix(".txt").exists() for p in pictures(folder))
    return any(beside) or any((folder / table).exists() for table in TABLES)


def place(folder: Path, k: int) -> Path:
    return folder / f"{MADE}{k:05d}.png"


def write(path: Path, image: Image.Image, about: str, caption: str | None) -> None:
    """The picture, whole or not at all, after its caption, if it has one of its own, beside it."""
    info, new = PngInfo(), path.with_name(f".{path.name}")
    info.add_itxt("sdtune", about)
    try:
        if caption:
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        image.save(new, format="PNG", pnginfo=info)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); make room, or name another --class-data") from None
