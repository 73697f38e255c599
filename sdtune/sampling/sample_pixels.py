"""``sdtune sample`` for a model of pixels: classes in place of prompts, what steers them, and how they come about."""

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DModel
from PIL import Image, ImageOps
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.diffusion.guides import ByClassifier, ByClip, Guide, embedded
from sdtune.diffusion.pixel_sampler import draw, to_images
from sdtune.diffusion.schedulers import make_scheduler
from sdtune.models.families import resolve_model
from sdtune.models.loading import class_labels, load_classifier, load_pipeline
from sdtune.models.pixel_models import named_classes
from sdtune.models.vision import load_clip
from sdtune.run.contact_sheet import grid

STEPS = 50
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def of_pixels(index: dict[str, Any]) -> bool:
    """Whether a ``model_index.json`` is that of an unconditional or class-conditional model without a VAE."""
    return index.get("unet") == ["diffusers", "UNet2DModel"] and not {"vae", "vqvae"} & index.keys()


class PixelJob:
    """The images of one call, for `sample.sample`: what each is to show, how to draw some of them, and their sheets.

    Args:
        prompts: what CLIP steers towards; none without CLIP.
    """

    def __init__(self, cfg: SampleConfig, prompts: Sequence[str]):
        if bool(prompts) != bool(cfg.clip_model):
            raise UserError(
                "--prompt: a model of pixels knows no prompts; CLIP does: --clip-model, --clip-guidance-scale"
                if prompts
                else "--clip-model: needs a --prompt to steer towards"
            )
        pipe = load_pipeline(cfg)
        self.cfg, self.unet = cfg, pipe.unet
        self.scheduler = make_scheduler(cfg.scheduler, pipe.scheduler, clip=True) if cfg.scheduler else pipe.scheduler
        if cfg.variance_type:
            self.scheduler = with_variance(self.scheduler, cfg.variance_type)
        timesteps = self.scheduler.config.num_train_timesteps
        self.steps = cfg.steps or (timesteps if isinstance(self.scheduler, DDPMScheduler) else min(STEPS, timesteps))
        self.scale = 1.0 if cfg.guidance_scale is None else cfg.guidance_scale

        asked = list(itertools.product(cfg.classes or [""], prompts or [""], range(cfg.num_images_per_prompt)))
        self.ends = [read_image(path, self.unet) for path in cfg.interpolate]
        if self.ends and len(asked) > 1:
            raise UserError("--interpolate: one row, so one class or prompt at most")
        if self.ends:  # all with the noise of one seed
            asked, self.seeds = asked * (cfg.interpolate_count + 2), [cfg.seed] * (cfg.interpolate_count + 2)
            shares = torch.linspace(0, 1, len(asked)).reshape(-1, 1, 1, 1)
            self.start = torch.lerp(*self.ends, shares)
        else:
            self.seeds = [cfg.seed + k for k in range(len(asked))]
        names = [name for name, _, _ in asked]
        self.records = [
            {"text": ", ".join(filter(None, [name, prompt])), "seed": seed} | ({"class": name} if name else {})
            for (name, prompt, _), seed in zip(asked, self.seeds, strict=True)
        ]

        self.labels = None
        if self.unet.config.num_class_embeds is not None:
            classes = named_classes(cfg, resolve_model(cfg.model), self.unet.config.num_class_embeds)
            self.labels = class_labels(names, classes, f"--model {cfg.model}") if cfg.classes else None
        elif cfg.classes and not cfg.classifier:
            raise UserError(f"--class: {cfg.model} knows no classes; a --classifier can steer it towards one")
        if self.labels is None and self.scale != 1:
            why = "knows no classes" if self.unet.config.num_class_embeds is None else "was asked for no --class"
            raise UserError(f"--guidance-scale {self.scale:g}: guides towards a class, and {cfg.model} {why}")
        if self.scale == 1 and cfg.guidance_rescale:
            raise UserError("--guidance-rescale: takes back some of --guidance-scale; give one other than 1")
        if cfg.classifier:
            self.classifier, classes = load_classifier(cfg.classifier, self.unet, self.scheduler)
            self.wanted = class_labels(names, classes, f"--classifier {cfg.classifier}")
        if cfg.clip_model:
            network, tokenizer = load_clip(cfg.clip_model)
            self.clip = network.to(self.unet.device)
            vectors = dict(zip(prompts, embedded(self.clip.model, tokenizer, list(prompts)), strict=True))
            self.texts = torch.stack([vectors[prompt] for _, prompt, _ in asked])
        self.frames: dict[int, Image.Image | None] = dict.fromkeys(self._strip_timesteps())

    @property
    def facts(self) -> dict[str, Any]:
        """What the text chunk of each image says of how it came about."""
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
        return facts | ({"Eta": cfg.eta} if cfg.eta else {})

    def draw(self, rows: slice, progress: Callable[[float], None]) -> list[Image.Image]:
        """The images ``rows`` of the call."""
        cfg = self.cfg
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
        """The timesteps that the strip shows, evenly over the steps, the last one always among them."""
        if not self.cfg.strip:
            return []
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        taken = [int(t) for t in scheduler.timesteps if not self.ends or t <= self.cfg.interpolate_timestep]
        places = torch.linspace(len(taken) - 1, 0, self.cfg.strip).round().int().tolist()[::-1]
        return [taken[k] for k in places]

    def _watch(self, t: int, x0: Tensor) -> None:
        if t in self.frames:
            self.frames[t] = to_images(x0[:1])[0]


def with_variance(scheduler: SchedulerMixin, kind: str) -> DDPMScheduler:
    """The ancestral sampler with another variance; `UserError` where the steps are not its."""
    if not isinstance(scheduler, DDPMScheduler):
        raise UserError(f"--variance-type: of --scheduler ddpm; {type(scheduler).__name__} has a noise of its own")
    return DDPMScheduler.from_config(scheduler.config, variance_type=kind)


def read_image(path: Path, unet: UNet2DModel) -> Tensor:
    """A picture in the model's mode and size, its middle cut out: ``[C, H, W]`` in [-1, 1]."""
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
