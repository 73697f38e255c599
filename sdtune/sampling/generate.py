"""Draws images of prompts with a stock pipeline: for ``sdtune sample``, and for the previews of training."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sdtune.config.sections import UserError
from sdtune.models import families
from sdtune.models.prompt_embeddings import Reading, prompt_arguments
from sdtune.models.prompts import without_weights

AS_STOCK = Reading()

CONTROL_IMAGE = "control_image"
"""What pipelines of transformers call the image that a ControlNet follows."""
MASK_IMAGE = "mask_image"
"""What inpainting pipelines call the mask beside the image."""
CONTROL_SCALES = ("controlnet_conditioning_scale", "adapter_conditioning_scale")
"""What pipelines call the weight of a control network."""


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    guidance_rescale: float = 0.0,
    batch_size: int = 4,
    width: int | None = None,
    height: int | None = None,
    reading: Reading = AS_STOCK,
    progress: Callable[[float], None] | None = None,
    images: Sequence[Sequence[Image.Image]] = (),
    control_scales: Sequence[float] = (),
    image_guidance_scale: float | None = None,
    noise_level: int | None = None,
) -> list[Image.Image]:
    """One image for each prompt, in order; image k has the noise of ``seeds[k]``.

    Modules in training mode are put in evaluation mode, and back.

    Args:
        progress: called with the share done, 0 to 1.
        images: those that go with each prompt, one for each control network, or the one that is edited; or none.
        control_scales: how closely each control network is followed; none for 1.
        image_guidance_scale: how closely an edit keeps to its image; ``None`` for the pipeline's own.
        noise_level: timestep to which an upscaler noises its image first; ``None`` for the pipeline's own.

    Raises:
        UserError: a size, a rescale or a number of steps that this pipeline cannot do.
    """
    if (width is None) != (height is None):  # diffusers would use its own for both
        raise UserError("width and height: give both, or neither for the base's own")
    accepted = inspect.signature(pipe.__call__).parameters
    family = families.family_class(type(pipe).__name__)
    options: dict[str, Any] = {"num_inference_steps": steps} | family.guidance(guidance_scale, negative_prompt)
    options |= family.picture_size(pipe, width, height) | {"guidance_rescale": guidance_rescale or None}
    options |= {"image_guidance_scale": image_guidance_scale, "noise_level": noise_level}
    if control_scales:
        name = next((name for name in CONTROL_SCALES if name in accepted), CONTROL_SCALES[0])
        options[name] = list(control_scales) if len(control_scales) > 1 else control_scales[0]
    options = {k: v for k, v in options.items() if v is not None}
    if refused := [k for k in options if k not in accepted]:
        raise UserError(f"{type(pipe).__name__} has no {', '.join(refused)}: leave it out")
    negative = options.pop("negative_prompt", None)
    parts = family.text_parts(pipe.components.get, pipe.components.get) if any(reading) else None
    pipe.set_progress_bar_config(disable=True)
    modules = [m for c in pipe.components.values() if isinstance(c, torch.nn.Module) for m in c.modules()]
    training = [m for m in modules if m.training]
    drawn: list[Image.Image] = []
    if MASK_IMAGE in accepted and not any(images):
        images = [all_hole(pipe, width, height)] * len(prompts)
    alone = any(images) and CONTROL_IMAGE in accepted
    if alone or any(len(own) > 1 for own in images):
        batch_size = 1  # a list of images is then one for each network
    try:
        for m in training:
            m.training = False
        # Prompts of one length at a time: an image does not depend on those that are drawn with it
        lengths = [parts.windows(without_weights(text)) if parts else 1 for text in prompts]
        # and images of one size, to which a stock call would bring them all
        sizes = [[image.size for image in own] for own in images] or [[]] * len(prompts)
        for rows in batches(list(zip(lengths, sizes, strict=True)), batch_size):
            if progress and "callback_on_step_end" in accepted:
                options["callback_on_step_end"] = _reporter(progress, len(drawn), len(rows), len(prompts))
            if any(images):
                options |= followed(accepted, [image for k in rows for image in images[k]], width)
            text_arguments = prompt_arguments(pipe, parts, [prompts[k] for k in rows], negative, reading)
            noise = [torch.Generator("cpu").manual_seed(seeds[k]) for k in rows]
            with seeded(seeds[rows[0]], pipe.device if alone else None):
                drawn += pipe(generator=noise, **text_arguments, **options).images
    except ValueError as error:  # diffusers checks sizes and numbers of steps, in words that name them
        raise UserError(f"{type(pipe).__name__}: {str(error).splitlines()[0]}") from error
    finally:
        for m in training:
            m.training = True
    return drawn


def followed(accepted: Mapping[str, Any], images: list[Image.Image], width: int | None) -> dict[str, Any]:
    """The arguments of a call for images to follow or to edit, whose size is drawn if no other is asked for."""
    size = {} if width else {"width": images[0].width, "height": images[0].height}
    if MASK_IMAGE in accepted:
        return {"image": images[0], MASK_IMAGE: images[1], "strength": 1.0} | size
    if CONTROL_IMAGE not in accepted:
        return {"image": images}
    return {CONTROL_IMAGE: images if len(images) > 1 else images[0]} | size


def all_hole(pipe: Any, width: int | None, height: int | None) -> list[Image.Image]:
    """A picture and a mask with which an inpainting pipeline paints all of it."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    size = width or side, height or side
    return [Image.new("RGB", size, (128, 128, 128)), Image.new("RGB", size, "white")]


@contextmanager
def seeded(seed: int, device: torch.device | None) -> Iterator[None]:
    """Context in which torch's own draws repeat: pipelines of ControlNets draw the latent of their image by them.

    Args:
        device: on which is drawn; ``None`` for pipelines that draw by their generator alone.
    """
    if device is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def batches(kinds: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Neighbouring places of one kind, at most ``size`` of them at a time."""
    for start in range(0, len(kinds), size):
        for _, run in itertools.groupby(range(start, min(start + size, len(kinds))), kinds.__getitem__):
            yield list(run)


def _reporter(progress: Callable[[float], None], done: int, batch: int, total: int) -> Callable[..., dict]:
    def report(pipe: DiffusionPipeline, step: int, _: Any, tensors: dict) -> dict:
        progress((done + batch * (step + 1) / pipe.num_timesteps) / total)
        return tensors

    return report
