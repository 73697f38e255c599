"""Class images of DreamBooth's prior preservation: uses those in the folder, and generates the missing ones.

Image k has a seed of its own and is drawn in a batch whose members never change, so the set is the same byte for byte
however many images are asked for, whichever process draws them, and however often the run was interrupted. An image is
written under another name first and then renamed.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import track

from sdtune.config.methods.prior import Prior
from sdtune.config.sections import UserError
from sdtune.config.untrusted import echo
from sdtune.data import Images, load_images
from sdtune.data.folder_captions import has_captions
from sdtune.data.folder_files import find_images
from sdtune.models.prompt_embeddings import Reading
from sdtune.models.prompts import check_prompts
from sdtune.run import rng
from sdtune.run.barrier import store_barrier
from sdtune.run.folder import CLASS_IMAGES
from sdtune.run.public_name import public_name
from sdtune.sampling.generate import generate

FOLDER = CLASS_IMAGES
MADE = "made-"
NUMBERED = re.compile(r"made-\d{5,}\.png")
"""Names of the images that are generated here; those with other names, such as copies, are the user's own."""


def class_images(cfg: Prior, family: Any, subject: Images, within: str = "") -> Images:
    """The class images of a run, after the base has generated the missing ones; called by every process.

    Args:
        subject: the images beside which they train.
        within: folder for them in the run's folder of class images, where a run has several classes.

    Raises:
        UserError: there are too few and no class prompt to generate more, or they were generated with other settings.
    """
    folder = (cfg.class_data or cfg.output_dir / FOLDER / within).expanduser()
    found = find_images(folder, Path(cfg.dataset))
    own = [p for p in found if not NUMBERED.fullmatch(p.name)]
    missing_count = cfg.num_class_images - len(own)
    if family.enlarges and missing_count > 0:
        raise UserError(
            f"--class-data {folder}: {len(own)} of --num-class-images {cfg.num_class_images}, and {cfg.model} enlarges "
            "pictures, but makes none from a prompt; add pictures, or ask for fewer"
        )
    if family.device.type == "meta" and len(found) < cfg.num_class_images:
        can_be_made(cfg, folder, own)
        return stand_ins(cfg, folder, subject, cfg.num_class_images - len(found))
    if missing_count > 0:
        if PartialState().is_main_process:
            check_prompts("--class-prompt", cfg.class_prompt, family.window, echo)
            prepare_folder(cfg, folder, own, missing_count)
        store_barrier()
        generate_missing(cfg, family, folder, missing_count)
    if not (cfg.class_prompt or has_captions(folder)):
        raise UserError(
            f"--class-data {folder}: the pictures have no captions; add --class-prompt, which is that of all"
        )
    caption = cfg.class_prompt[0] if cfg.class_prompt else None
    changed = {"dataset": str(folder), "caption": None, "caption_column": None, "mask_column": None}
    changed["max_train_samples"] = cfg.num_class_images
    return load_images(cfg.model_copy(update=changed), default_caption=caption, leave_out=Path(cfg.dataset))


def stand_ins(cfg: Prior, folder: Path, subject: Images, missing_count: int) -> Images:
    """Images of the subject in the place of class images, where nothing is drawn: as many, and each another one."""
    places = [k % len(subject.rows) for k in range(cfg.num_class_images)]
    shape = {"width": cfg.resolution, "height": cfg.resolution, "repeats": 1, "mask": None}
    rows = [
        subject.rows[place]._replace(name=path_of(folder, k).name, sha256=f"class image {k}", **shape)
        for k, place in enumerate(places)
    ]
    note = f"class images that the run will make: {missing_count} of {cfg.num_class_images}"
    sources = [subject.sources[place] for place in places]
    return replace(subject, rows=rows, sources=sources, masks=(), ignored=[], skipped=[], notes=[note])


def can_be_made(cfg: Prior, folder: Path, own: list[Path]) -> None:
    """Raises: UserError when the prompts do not say what the missing images show."""
    have = f"--class-data {folder}: {len(own)} of --num-class-images {cfg.num_class_images}"
    if not cfg.class_prompt:
        raise UserError(f"{have}, and nothing to make more from; add --class-prompt, pictures, or ask for fewer")
    if own and len(cfg.class_prompt) > 1:
        raise UserError(
            f"{have}, and it is not said which of the class prompts they show; give one prompt, add pictures, or name "
            "another folder"
        )


def prepare_folder(cfg: Prior, folder: Path, own: list[Path], missing_count: int) -> None:
    """Make sure that images can be generated into a folder; in the run's own, those of other settings are removed.

    Raises:
        UserError: the prompts, the folder or images of other settings are in the way.
    """
    can_be_made(cfg, folder, own)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--class-data {folder}: cannot be written ({error.strerror})") from None
    wanted = {path_of(folder, k) for k in range(missing_count)}
    for file in [p for p in find_images(folder, Path(cfg.dataset)) if NUMBERED.fullmatch(p.name)]:
        made = settings_of(file)
        if cfg.class_data and made != settings(cfg):
            raise UserError(
                f"{file} was made with other settings ({made}); name another --class-data folder, or remove {MADE}*"
            )
        if made != settings(cfg) or file not in wanted:
            file.unlink()
            file.with_suffix(".txt").unlink(missing_ok=True)


def generate_missing(cfg: Prior, family: Any, folder: Path, count: int) -> None:
    """Generate this process's share of the missing images 0 to ``count``, and wait for the other processes."""
    state, size = PartialState(), cfg.sample_batch_size
    batches = [range(k, k + size) for k in range(0, count, size)]  # complete ones, whatever the count
    missing = [batch for batch in batches if not all(path_of(folder, k).exists() for k in batch if k < count)]
    store_barrier()  # no process draws before all have listed what is missing
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
                reading=Reading(cfg.long_prompts),
            )
        for k, prompt, image in zip(range(batch.start, min(batch.stop, count)), prompts, images, strict=False):
            write(path_of(folder, k), image, settings(cfg), prompt if len(cfg.class_prompt) > 1 else None)
    if mine:
        family.set_aside()
    store_barrier()


def settings(cfg: Prior) -> str:
    """All that a generated image depends on, as JSON, which is stored in the image."""
    names = "revision seed class_prompt sample_batch_size class_inference_steps class_guidance_scale resolution".split()
    chosen: dict[str, Any] = {"model": public_name(cfg.model)} | {name: getattr(cfg, name) for name in names}
    if cfg.clip_skip is not None:
        chosen["clip_skip"] = cfg.clip_skip
    if cfg.long_prompts:
        chosen["long_prompts"] = True
    return json.dumps(chosen, sort_keys=True, ensure_ascii=False)


def settings_of(file: Path) -> str:
    """The settings that a generated image carries, or what is there in their place."""
    try:
        with Image.open(file) as image:
            return str(image.info.get("sdtune", "no settings"))
    except (OSError, ValueError, SyntaxError):  # SyntaxError: Pillow on a broken PNG
        return "no readable image"


def path_of(folder: Path, k: int) -> Path:
    return folder / f"{MADE}{k:05d}.png"


def write(path: Path, image: Image.Image, about: str, caption: str | None) -> None:
    """Write the image, complete or not at all, and before it its caption if it has one of its own."""
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
