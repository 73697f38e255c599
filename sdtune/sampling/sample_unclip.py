"""``sdtune sample`` for an unCLIP decoder such as Kandinsky 2.2's: a prior says in CLIP's space what it draws.

Image k is that of stock diffusers, with ``generator = torch.Generator("cpu").manual_seed(seed + k)``, anew for each:

    embeds = prior(prompt, num_inference_steps=25, guidance_scale=4.0, generator=...)
    decoder(**embeds, num_inference_steps=25, guidance_scale=4.0, generator=...).images[0]

An image in place of a prompt is embedded itself, and drawn anew: a variation (Ramesh et al. 2022, section 3.1). Between
two images their embeddings are interpolated on the sphere (section 3.2).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.diffusion.schedulers import make_scheduler
from sdtune.models.controls import read_image
from sdtune.models.loading import load_adapters, load_pipeline
from sdtune.models.prompts import check_negative
from sdtune.models.unclip import load_prior
from sdtune.run.contact_sheet import grid
from sdtune.run.device import best_device
from sdtune.run.precision import DTYPES
from sdtune.sampling.prompts import Prompt

STEPS, GUIDANCE = 25, 4.0


class UnclipJob:
    """The images of one call, for `sample.sample`: of prompts, of images, or between two images.

    Raises:
        UserError: there is nothing to draw, or more than one kind of it; no prior; an image that cannot be read.
    """

    def __init__(self, cfg: SampleConfig, prompts: Sequence[Prompt]):
        asked = {"--prompt": prompts, "--image": cfg.image, "--interpolate": cfg.interpolate}
        given = [option for option, value in asked.items() if value]
        if not given:
            raise UserError(f"there is nothing to draw: give one of {', '.join(asked)}")
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: {cfg.model} draws what one of them says; give one")
        if cfg.prior is None:
            raise UserError(f"--prior: {cfg.model} draws what a prior says; give one, a folder or a Hub id")
        if any(prompt.settings for prompt in prompts):
            raise UserError(f"--prompt-file: its lines have options, which {cfg.model}, a decoder, does not use")
        self.cfg = cfg
        self.between = [read_image(file, f"--interpolate {file}") for file in cfg.interpolate]
        self.images = [read_image(file, f"--image {file}") for file in cfg.image]
        self.pipe = load_pipeline(cfg)
        self.prior = load_prior(cfg.prior, DTYPES[cfg.mixed_precision], best_device())
        self.load_adapters()
        width, made_for = self.prior.image_encoder.config.projection_dim, self.pipe.unet.config.encoder_hid_dim
        if width != made_for:
            raise UserError(f"--prior {cfg.prior}: its embeddings have {width} numbers, {cfg.model} wants {made_for}")
        if cfg.scheduler:
            self.pipe.scheduler = make_scheduler(cfg.scheduler, self.pipe.scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps = cfg.steps or STEPS
        self.scale = GUIDANCE if cfg.guidance_scale is None else cfg.guidance_scale
        check_negative(cfg.negative_prompt, max(self.scale, cfg.prior_guidance_scale), "--negative-prompt", print)
        self.set_up(prompts)

    def set_up(self, prompts: Sequence[Prompt]) -> None:
        cfg, each = self.cfg, range(self.cfg.num_images_per_prompt)
        if self.between:
            count = cfg.interpolate_count + 2
            self.records: list[dict[str, Any]] = [
                {"text": f"{k / (count - 1):.2g}", "seed": cfg.seed, "share": k / (count - 1)} for k in range(count)
            ]
            return
        texts = [{"text": p.text} for p in prompts]
        pictures = [{"text": "", "image": str(file)} for file in cfg.image]
        asked = [record for record in texts or pictures for _ in each]
        self.records = [record | {"seed": cfg.seed + k} for k, record in enumerate(asked)]

    def load_adapters(self) -> None:
        """Each on the model that it was made for, the prior or the decoder."""
        cfg = self.cfg
        parts = {"prior": self.prior.prior, "unet": self.pipe.unet}
        load_adapters(OfParts(parts), cfg.adapter)

    @property
    def facts(self) -> dict[str, Any]:
        sampler = type(self.pipe.scheduler).__name__
        facts = {"Steps": self.steps, "Sampler": sampler, "CFG scale": self.scale, "Prior": self.cfg.prior}
        if self.between:
            facts["Between"] = " and ".join(file.name for file in self.cfg.interpolate)
        return facts

    @torch.no_grad()
    def draw(self, rows: slice, progress: Callable[[float], None]) -> list[Image.Image]:
        """The images ``rows`` of the call."""
        cfg, records = self.cfg, self.records[rows]
        pairs = [self.embeddings(record) for record in records]
        embeds, against = (torch.cat(column) for column in zip(*pairs, strict=True))
        scale = self.pipe.movq_scale_factor
        side = self.pipe.unet.config.sample_size * scale
        sizes = {"height": cfg.height or side, "width": cfg.width or side}
        if wrong := [n for n in sizes.values() if n % scale**2]:
            raise UserError(f"--width, --height: {wrong[0]}; {cfg.model} draws multiples of {scale**2} pixels")

        def report(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress((step + 1) / pipe.num_timesteps)
            return tensors

        drawn: list[Image.Image] = self.pipe(
            image_embeds=embeds,
            negative_image_embeds=against,
            **sizes,
            num_inference_steps=self.steps,
            guidance_scale=self.scale,
            generator=[generator(record["seed"]) for record in records],
            callback_on_step_end=report,
        ).images
        return drawn

    def embeddings(self, record: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What to draw and what to draw away from, each ``[1, D]``."""
        cfg, prior = self.cfg, self.prior
        nothing = prior.get_zero_embed(1)
        if "share" in record:
            return spherical(*map(self.embedded, self.between), record["share"]), nothing
        if "image" in record:
            return self.embedded(self.images[cfg.image.index(Path(record["image"]))]), nothing
        out = prior(
            record["text"],
            negative_prompt=cfg.negative_prompt or None,
            num_inference_steps=cfg.prior_steps,
            guidance_scale=cfg.prior_guidance_scale,
            generator=generator(record["seed"]),
        )
        return out.image_embeds, out.negative_image_embeds

    def embedded(self, image: Image.Image) -> Tensor:
        encoder = self.prior.image_encoder
        pixels = self.prior.image_processor(image, return_tensors="pt").pixel_values
        embeds: Tensor = encoder(pixels.to(encoder.device, encoder.dtype)).image_embeds
        return embeds

    def sheets(self, images: Sequence[Image.Image]) -> dict[str, Image.Image]:
        if self.between:
            row = [self.between[0].resize(images[0].size), *images, self.between[1].resize(images[0].size)]
            texts = ["source", *(record["text"] for record in self.records), "source"]
            return {"interpolation.png": grid(row, texts, columns=len(row))}
        texts = [record["text"] or Path(record["image"]).name for record in self.records[: len(images)]]
        return {"grid.png": grid(images, texts)}


class OfParts:
    """What `load_adapters` needs of a pipeline, for models of two."""

    def __init__(self, parts: dict[str, Any]):
        self.components = parts

    def set_adapters(self, names: Sequence[str], weights: Sequence[float]) -> None:
        for part in self.components.values():
            own = [
                (name, w) for name, w in zip(names, weights, strict=True) if name in (getattr(part, "peft_config", {}))
            ]
            if own:
                part.set_adapters([name for name, _ in own], [w for _, w in own])


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def spherical(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between two vectors ``[1, D]``, on an arc; its length goes from that of one to that of the other."""
    lengths = [x.norm(dim=1, keepdim=True) for x in (a, b)]
    u, v = a / lengths[0], b / lengths[1]
    angle = torch.arccos((u * v).sum(1, keepdim=True).clamp(-1, 1))
    if angle.abs().max() < 1e-4:  # too near to each other for an arc, and for its sine
        return torch.lerp(a, b, share)
    along = (torch.sin((1 - share) * angle) * u + torch.sin(share * angle) * v) / torch.sin(angle)
    return along * torch.lerp(*lengths, share)
