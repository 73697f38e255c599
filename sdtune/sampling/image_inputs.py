"""The images that ``sdtune sample`` follows or edits: which go with which prompt, and whether a pipeline takes them."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from sdtune.config.errors import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.models.controls import read_image
from sdtune.sampling.prompts import Prompt


def images_of(cfg: SampleConfig, prompts: Sequence[Prompt]) -> list[list[Path]]:
    """The files that go with each image that is drawn; empty where none do.

    Raises:
        UserError: there are not as many as there are prompts, or one cannot be read.
    """
    each = max(1, len(cfg.control))
    given = [cfg.image[k : k + each] for k in range(0, len(cfg.image), each)]
    if len(cfg.mask_image) not in (0, len(cfg.image)):
        raise UserError(f"--mask-image: {len(cfg.mask_image)} masks for {len(cfg.image)} images; give one for each")
    own = [[Path(prompt.settings["image"])] if "image" in prompt.settings else None for prompt in prompts]
    if len(cfg.image) % each or len(given) not in (0, 1, len(prompts)) or (any(own) and each > 1):
        raise UserError(
            f"--image: {len(cfg.image)} images for {len(prompts)} prompts; give "
            + (f"{each}, one for each --control" if each > 1 else "one for all prompts")
            + f", or {each * len(prompts)}, {'these for each' if each > 1 else 'one for each'} prompt"
        )
    found = [one or (given[k % len(given)] if given else []) for k, one in enumerate(own)]
    for file in dict.fromkeys(itertools.chain.from_iterable(found)):
        read_image(file, f"--image {file}")
    if cfg.mask_image:
        of_image = dict(zip(cfg.image, cfg.mask_image, strict=True))
        found = [[file for image in files for file in (image, of_image.get(image, image))] for files in found]
        for file in cfg.mask_image:
            read_image(file, f"--mask-image {file}")
    return [files for files in found for _ in range(cfg.num_images_per_prompt)]


def check_images(pipe: DiffusionPipeline, cfg: SampleConfig, images: Sequence[Sequence[Path]]) -> None:
    """Raises: UserError for images that a pipeline has no use for, or lacks."""
    kind, given = type(pipe).__name__, [bool(files) for files in images]
    paints = "Inpaint" in kind
    if cfg.mask_image and not paints:
        raise UserError(f"--mask-image: {cfg.model} is no inpainting model; leave it out")
    if paints and any(given):
        if not cfg.mask_image:
            raise UserError("--mask-image: an inpainting model paints where a mask is white; give one for each --image")
        if not all(given):
            raise UserError("--image: give one for all prompts, or one for each prompt, each with its --mask-image")
    if paints:
        return
    does = "enlarges" if "Upscale" in kind else "edits"
    takes = bool(cfg.control) or "InstructPix2Pix" in kind or does == "enlarges"
    if any(given) and not takes:
        raise UserError(
            f"--image: {cfg.model} follows no image and edits none; give the network that does with --control"
        )
    if not all(given) and takes:
        what = "each network of --control follows an image" if cfg.control else f"a {kind} {does} an image"
        raise UserError(f"--image: {what}; give one, or one for each prompt")
