"""Enlarges small images with models of `sdtune super-resolution`, by their stock pipeline.

They are the model of a call (``--model RUN --image FILE``), or those after it, a cascade (``--then RUN``). Image k is a
function of the image that is enlarged and of seed k alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import IFSuperResolutionPipeline
from PIL import Image

from sdtune.config.errors import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.diffusion.pixel_sampler import evaluating
from sdtune.diffusion.schedulers import choose_scheduler, with_variance
from sdtune.models.controls import read_image
from sdtune.models.enlargers import NO_TEXT
from sdtune.models.loading import load_pipeline, read_sampling
from sdtune.models.part_files import has_part
from sdtune.run.contact_sheet import grid, opaque
from sdtune.run.sampling_file import SAMPLING
from sdtune.sampling.generate import batches

NEXT = 1_000_000
"""What each further model of a cascade adds to the seed of an image, lest it start from the noise of the one before."""

SHARED = ("noise_level", "mixed_precision", "cache_dir")
"""Options of a call that hold for the models of ``--then`` too."""


def is_enlarger(index: dict[str, Any]) -> bool:
    """Whether a ``model_index.json`` is that of a model that enlarges and reads no text."""
    return index.get("_class_name") == "IFSuperResolutionPipeline" and not has_part(index, "text_encoder")


@torch.no_grad()
def enlarge(
    pipe: IFSuperResolutionPipeline,
    images: Sequence[Image.Image],
    seeds: Sequence[int],
    factor: int,
    *,
    steps: int,
    noise_level: int = 0,
    batch_size: int = 4,
    progress: Callable[[float], None] | None = None,
) -> list[Image.Image]:
    """Each of ``images``, in RGB, with sides ``factor`` times as long; number k has the noise of ``seeds[k]``.

    Args:
        noise_level: timestep to which an image is noised first.
        progress: called with the share done, 0 to 1.
    """
    drawn: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    with evaluating(pipe.unet):
        for rows in batches([image.size for image in images], batch_size):
            width, height = (factor * side for side in images[rows[0]].size)
            drawn += pipe(
                image=[images[k] for k in rows],
                prompt_embeds=torch.zeros(len(rows), 1, NO_TEXT, device=pipe.unet.device, dtype=pipe.unet.dtype),
                guidance_scale=1.0,
                noise_level=noise_level,
                num_inference_steps=steps,
                width=width,
                height=height,
                generator=[torch.Generator("cpu").manual_seed(seeds[k]) for k in rows],
                callback=progress and _reporter(progress, len(drawn), len(rows) / steps, len(images)),
            ).images
    return drawn


def _reporter(progress: Callable[[float], None], done: int, each: float, total: int) -> Callable[..., None]:
    return lambda step, t, x: progress((done + each * (step + 1)) / total)


class Enlarger:
    """A model that enlarges, and how it does.

    Args:
        model: its folder or Hub id, that the ``option`` of `cfg` names.
        option: ``--model``, or ``--then``, for which steps and sampler are the model's own.

    Raises:
        UserError: it is no such model, or cannot do what ``cfg`` asks for.
    """

    def __init__(self, cfg: SampleConfig, model: str, option: str):
        if option == "--then":
            cfg = SampleConfig.model_construct(model=model, **{name: getattr(cfg, name) for name in SHARED})
        try:
            pipe: Any = load_pipeline(cfg)
        except UserError as error:
            raise UserError(str(error).replace("--model", option, 1)) from None
        how = read_sampling(cfg, model)
        if not isinstance(pipe, IFSuperResolutionPipeline) or how is None or how.factor is None:
            raise UserError(f"{option} {model}: no model that enlarges, with a factor in its {SAMPLING}")
        self.pipe, self.factor, self.steps = pipe, how.factor, cfg.steps or how.steps
        self.noise_level = int((how.call or {}).get("noise_level", 0)) if cfg.noise_level is None else cfg.noise_level
        if self.noise_level > (most := how.max_noise_level or 0):
            raise UserError(f"--noise-level {self.noise_level}: {model} was trained up to {most}")
        self.pipe.scheduler = suited(choose_scheduler(cfg.scheduler, pipe.scheduler, cfg), cfg.scheduler)
        if cfg.variance_type:
            self.pipe.scheduler = with_variance(self.pipe.scheduler, cfg.variance_type)
        if self.steps > (timesteps := len(self.pipe.scheduler.alphas_cumprod)):
            raise UserError(f"--steps {self.steps}: {model} has {timesteps} timesteps")

    def __call__(
        self, images: Sequence[Image.Image], seeds: Sequence[int], batch_size: int, progress: Callable[[float], None]
    ) -> list[Image.Image]:
        how: dict[str, Any] = {"steps": self.steps, "noise_level": self.noise_level}
        shown = [opaque(image) for image in images]
        return enlarge(self.pipe, shown, seeds, self.factor, **how, batch_size=batch_size, progress=progress)


def suited(scheduler: Any, name: str | None) -> Any:
    """A sampler as the stock pipeline takes one. Raises: UserError for one that scales its input."""
    scheduler.set_timesteps(2)
    if scheduler.init_noise_sigma != 1:
        raise UserError(f"--scheduler {name}: scales what it is given, and so the small image; ddim and ddpm do not")
    if "variance_type" not in scheduler.config:  # the stock call reads it, whatever the sampler
        scheduler.register_to_config(variance_type=None)
    return scheduler


class EnlargeJob:
    """The images of one call whose model enlarges, for `sample.sample`."""

    def __init__(self, cfg: SampleConfig):
        if not cfg.image:
            raise UserError(f"--image: {cfg.model} enlarges an image; give one or several")
        files = [file for file in cfg.image for _ in range(cfg.num_images_per_prompt)]
        self.images = [read_image(file, f"--image {file}") for file in files]
        self.cfg, self.model = cfg, Enlarger(cfg, cfg.model, "--model")
        self.records: list[dict[str, Any]] = [
            {"text": "", "seed": cfg.seed + k, "image": str(file)} for k, file in enumerate(files)
        ]
        sampler = type(self.model.pipe.scheduler).__name__
        self.facts = {"Steps": self.model.steps, "Sampler": sampler, "Noise level": self.model.noise_level}

    def draw(self, rows: slice, progress: Callable[[float], None]) -> list[Image.Image]:
        """The images ``rows`` of the call."""
        seeds = [record["seed"] for record in self.records[rows]]
        return self.model(self.images[rows], seeds, self.cfg.batch_size, progress)

    def sheets(self, images: Sequence[Image.Image]) -> dict[str, Image.Image]:
        return {"grid.png": grid(images, [Path(record["image"]).name for record in self.records[: len(images)]])}


def _part_of(progress: Callable[[float], None], k: int, parts: int) -> Callable[[float], None]:
    """The share done of part ``k``, told as that of the whole."""
    return lambda share: progress((k + share) / parts)


class Cascade:
    """The images of a call that models enlarge, one after another.

    Args:
        first: what draws them.
    """

    def __init__(self, cfg: SampleConfig, first: Any):
        self.cfg, self.first, self.records = cfg, first, first.records
        self.then = [Enlarger(cfg, model, "--then") for model in cfg.then]

    @property
    def facts(self) -> dict[str, Any]:
        told: dict[str, Any] = {"Then": " ".join(self.cfg.then), "Noise level": self.then[0].noise_level}
        return dict(self.first.facts) | told

    def draw(self, rows: slice, progress: Callable[[float], None]) -> list[Image.Image]:
        """The images ``rows`` of the call."""
        parts = len(self.then) + 1
        images: list[Image.Image] = self.first.draw(rows, _part_of(progress, 0, parts))
        for k, enlarger in enumerate(self.then, 1):
            seeds = [record["seed"] + k * NEXT for record in self.records[rows]]
            images = enlarger(images, seeds, self.cfg.batch_size, _part_of(progress, k, parts))
        return images

    def sheets(self, images: Sequence[Image.Image]) -> dict[str, Image.Image]:
        return dict(self.first.sheets(images))
