"""``sdtune sample`` for a pixel model: classes in place of prompts, guidance, interpolation and the strip."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler, SchedulerMixin, UNet2DModel
from PIL import Image, ImageOps
from torch import Tensor

from sdtune.config.fields import flag
from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.diffusion.guides import ByClassifier, ByClip, Guide, embedded, knows_noise
from sdtune.diffusion.pixel_sampler import draw, draw_consistency, to_images
from sdtune.diffusion.schedulers import choose_scheduler, with_variance
from sdtune.models.families import resolve_model
from sdtune.models.loading import class_labels, load_classifier, load_pipeline, read_sampling
from sdtune.models.pixel_models import named_classes
from sdtune.models.vision import load_clip
from sdtune.run.contact_sheet import grid

STEPS = 50
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def of_pixels(index: dict[str, Any]) -> bool:
    """Whether a ``model_index.json`` is that of an unconditional or class-conditional model without a VAE."""
    return index.get("unet") == ["diffusers", "UNet2DModel"] and not {"vae", "vqvae"} & index.keys()


@dataclass(frozen=True)
class Request:
    """What one call is asked for: an image each of classes x prompts x ``num_images_per_prompt``."""

    classes: list[str]
    """The class of each image; empty text where none is asked for."""
    prompts: list[str]
    """The prompt that CLIP steers each image towards; empty text without CLIP."""
    seeds: list[int]

    @property
    def records(self) -> list[dict[str, Any]]:
        """``text``, ``seed`` and, if there is one, ``class`` of each image."""
        texts = [", ".join(filter(None, pair)) for pair in zip(self.classes, self.prompts, strict=True)]
        named = [{"class": name} if name else {} for name in self.classes]
        return [{"text": t, "seed": s} | n for t, s, n in zip(texts, self.seeds, named, strict=True)]


def request_of(cfg: SampleConfig, prompts: Sequence[str]) -> Request:
    """The images that ``cfg`` asks for; a row of interpolation uses the noise of one seed for all.

    Raises:
        UserError: prompts without CLIP or CLIP without prompts, or several classes or prompts to interpolate.
    """
    if prompts and not cfg.clip_model:
        raise UserError("--prompt: a model of pixels knows no prompts; CLIP does: --clip-model, --clip-guidance-scale")
    if cfg.clip_model and not prompts:
        raise UserError("--clip-model: needs a --prompt to steer towards")
    asked = list(itertools.product(cfg.classes or [""], prompts or [""], range(cfg.num_images_per_prompt)))
    seeds = [cfg.seed + k for k in range(len(asked))]
    if cfg.interpolate:
        if len(asked) > 1:
            raise UserError("--interpolate: one row, so one class or prompt at most")
        asked, seeds = asked * (cfg.interpolate_count + 2), seeds * (cfg.interpolate_count + 2)
    return Request([name for name, _, _ in asked], [prompt for _, prompt, _ in asked], seeds)


def validate(cfg: SampleConfig, classes: int | None) -> None:
    """Check classes and guidance against the model.

    Args:
        classes: embeddings of classes that the network has; None without classes.

    Raises:
        UserError: an option that this model has no use for.
    """
    scale = cfg.guidance_scale
    if cfg.classes and classes is None and not cfg.classifier:
        raise UserError(f"--class: {cfg.model} knows no classes; a --classifier can steer it towards one")
    if scale not in (None, 1) and (classes is None or not cfg.classes):
        why = "knows no classes" if classes is None else "was asked for no --class"
        raise UserError(f"--guidance-scale {scale:g}: guides towards a class, and {cfg.model} {why}")
    if scale in (None, 1) and cfg.guidance_rescale:
        raise UserError("--guidance-rescale: reduces the effect of --guidance-scale; give one other than 1")


def default_steps(cfg: SampleConfig, scheduler: SchedulerMixin) -> int:
    """Steps of a call that names none: a distilled model's own, all timesteps of DDPM, or 50."""
    if own := read_sampling(cfg, cfg.model):
        return own.steps
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        return 1
    timesteps = int(scheduler.config.num_train_timesteps)
    return timesteps if isinstance(scheduler, DDPMScheduler) else min(STEPS, timesteps)


STEERING = "classifier clip_model eta strip interpolate guidance_rescale out_of_range"
"""Options of sampling through many steps."""


def refuse_steering(cfg: SampleConfig) -> None:
    """Raises: UserError for an option that a consistency model, which goes straight to the image, has no steps for."""
    defaults = {name: SampleConfig.model_fields[name].get_default() for name in STEERING.split()}
    given = [flag(name) for name, default in defaults.items() if getattr(cfg, name) != default]
    if cfg.guidance_scale not in (None, 1):
        given.append("--guidance-scale")
    if given:
        raise UserError(
            f"{', '.join(given)}: {cfg.model} is a consistency model, which has no steps to steer; leave out"
        )


class PixelJob:
    """The images of one call, for `sample.sample`: what each shows, how they are drawn, and their sheets.

    Args:
        prompts: what CLIP steers towards; empty without CLIP.
    """

    def __init__(self, cfg: SampleConfig, prompts: Sequence[str]):
        request = request_of(cfg, prompts)
        pipe = load_pipeline(cfg)
        self.cfg, self.unet, self.seeds, self.records = cfg, pipe.unet, request.seeds, request.records
        self.scheduler: Any = choose_scheduler(cfg.scheduler, pipe.scheduler, cfg)
        if cfg.variance_type:
            self.scheduler = with_variance(self.scheduler, cfg.variance_type)
        self.consistency = isinstance(self.scheduler, CMStochasticIterativeScheduler)
        if self.consistency:
            refuse_steering(cfg)
        self.steps = cfg.steps or default_steps(cfg, self.scheduler)
        self.scale = 1.0 if cfg.guidance_scale is None else cfg.guidance_scale
        self.ends = [read_image(path, self.unet) for path in cfg.interpolate]
        if self.ends:
            shares = torch.linspace(0, 1, len(self.seeds)).reshape(-1, 1, 1, 1)
            self.start = torch.lerp(*self.ends, shares)
        validate(cfg, self.unet.config.num_class_embeds)
        self.labels = self._labels(request)
        self._load_guides(request)
        self.frames: dict[int, Image.Image | None] = dict.fromkeys(self._strip_timesteps())

    def _labels(self, request: Request) -> Tensor | None:
        """The model's label of each image: int64 [N]; None if it has no classes or is asked for none."""
        if self.unet.config.num_class_embeds is None:
            return None
        classes = named_classes(self.cfg, resolve_model(self.cfg.model), self.unet.config.num_class_embeds)
        return class_labels(request.classes, classes, f"--model {self.cfg.model}") if self.cfg.classes else None

    def _load_guides(self, request: Request) -> None:
        cfg = self.cfg
        if cfg.classifier:
            self.classifier, classes = load_classifier(cfg.classifier, self.unet, self.scheduler)
            self.wanted = class_labels(request.classes, classes, f"--classifier {cfg.classifier}")
        if cfg.clip_model:
            network, tokenizer = load_clip(cfg.clip_model)
            if knows_noise(network.model) and self.unet.config.in_channels in (2, 4):
                raise UserError(
                    f"--clip-model {cfg.clip_model}: was trained on noised pictures without transparency, which "
                    f"{cfg.model} draws; take a CLIP that was trained without --noised"
                )
            self.clip = network.to(self.unet.device)
            prompts = list(dict.fromkeys(request.prompts))
            vectors = dict(zip(prompts, embedded(self.clip.model, tokenizer, prompts), strict=True))
            self.texts = torch.stack([vectors[prompt] for prompt in request.prompts])

    @property
    def facts(self) -> dict[str, Any]:
        """How the images were made, for the text chunk of each."""
        cfg, facts = self.cfg, {"Steps": self.steps, "Sampler": type(self.scheduler).__name__}
        if self.labels is not None:
            facts["CFG scale"] = self.scale
        if cfg.classifier:
            facts |= {"Classifier": cfg.classifier, "Classifier scale": cfg.classifier_scale}
        if cfg.clip_model:
            facts |= {"CLIP": cfg.clip_model, "CLIP scale": cfg.clip_guidance_scale}
        if cfg.interpolate:
            facts |= {
                "Between": " and ".join(p.name for p in cfg.interpolate),
                "From timestep": cfg.interpolate_timestep,
            }
        if cfg.variance_type:
            facts["Variance"] = cfg.variance_type
        if cfg.out_of_range:
            facts["Out of range"] = cfg.out_of_range
        return facts | ({"Eta": cfg.eta} if cfg.eta else {})

    def draw(self, rows: slice, progress: Callable[[float], None]) -> list[Image.Image]:
        """The images ``rows`` of the call."""
        cfg = self.cfg
        if self.consistency:
            labels = None if self.labels is None else self.labels[rows]
            options: dict[str, Any] = {"batch_size": cfg.batch_size, "progress": progress}
            seeds = self.seeds[rows]
            return to_images(
                draw_consistency(self.unet, self.scheduler, seeds, steps=self.steps, labels=labels, **options)
            )
        drawn = draw(
            self.unet,
            self.scheduler,
            self.seeds[rows],
            steps=self.steps,
            labels=None if self.labels is None else self.labels[rows],
            guidance_scale=self.scale,
            guidance_rescale=cfg.guidance_rescale,
            guides=self._guides(rows),
            start=(self.start[rows], cfg.interpolate_timestep) if self.ends else None,
            eta=cfg.eta,
            batch_size=cfg.batch_size,
            watch=self._watch if self.frames and rows.start == 0 else None,
            progress=progress,
        )
        return to_images(drawn)

    def sheets(self, images: Sequence[Image.Image]) -> dict[str, Image.Image]:
        """File name to sheet, of the first images of the call."""
        texts = [record["text"] for record in self.records[: len(images)]]
        if self.ends:
            shares = [f"{k / (len(images) - 1):.2g}" for k in range(len(images))]
            shares[0], shares[-1] = "0, reconstructed", "1, reconstructed"
            sources = to_images(torch.stack(self.ends))
            row = [sources[0], *images, sources[1]]
            sheets = {"interpolation.png": grid(row, ["source", *shares, "source"], columns=len(row))}
        else:
            sheets = {"grid.png": grid(images, texts if any(texts) else None)}
        if frames := {t: image for t, image in self.frames.items() if image}:
            sheets["strip.png"] = grid([*frames.values()], [f"t = {t}" for t in frames], columns=len(frames))
        return sheets

    def _guides(self, rows: slice) -> list[Guide]:
        cfg, guides = self.cfg, []
        if cfg.classifier:
            guides.append(ByClassifier(self.classifier, self.wanted[rows], cfg.classifier_scale))
        if cfg.clip_model:
            guides.append(ByClip(self.clip, self.texts[rows], cfg.clip_guidance_scale))
        return guides

    def _strip_timesteps(self) -> list[int]:
        """The timesteps that the strip shows: evenly spaced over the steps, always with the last."""
        if not self.cfg.strip:
            return []
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        steps = [int(t) for t in scheduler.timesteps if not self.ends or t <= self.cfg.interpolate_timestep]
        places = torch.linspace(len(steps) - 1, 0, self.cfg.strip).round().int().tolist()[::-1]
        return [steps[k] for k in places]

    def _watch(self, t: int, x0: Tensor) -> None:
        if t in self.frames:
            self.frames[t] = to_images(x0[:1])[0]


def read_image(path: Path, unet: UNet2DModel) -> Tensor:
    """An image in the model's mode and size, cropped to its centre: ``[C, H, W]`` in [-1, 1]."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert(MODES[unet.config.in_channels])
    except OSError as error:
        raise UserError(f"--interpolate {path}: {error.strerror or 'not an image that can be read'}") from error
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, -1)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
