"""Images from a pipeline: the grids of a training run, and ``sdtune sample``."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.progress import track

from sdtune import adapters, families
from sdtune.configs import SampleConfig, UserError
from sdtune.precision import DTYPES
from sdtune.sheets import grid, save_sheet

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
CANNOT_END_IN_NOISE = ("heun", "lms", "pndm")
"""Schedulers that do not know a schedule rescaled to zero terminal SNR: they would start from the wrong noise."""


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Iterable[int],
    *,
    steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    guidance_rescale: float = 0.0,
    batch_size: int = 4,
    width: int | None = None,
    height: int | None = None,
) -> list[Image.Image]:
    """An image of each prompt; image k starts from the noise of ``torch.Generator("cpu").manual_seed(seeds[k])``.

    So stock diffusers gives the same image from the same prompt and seed, on any device and in any batch.

    Args:
        width, height: pixels; ``None`` is the size the base was made for.
    """
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    wanted = list(zip(prompts, seeds, strict=True))
    for first in range(0, len(wanted), batch_size):
        batch = wanted[first : first + batch_size]
        images += pipeline(
            [prompt for prompt, _ in batch],
            negative_prompt=[negative_prompt] * len(batch) if guidance_scale > 1 else None,
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            width=width,
            height=height,
        ).images
    return images


def sample(cfg: SampleConfig) -> None:
    """What ``sdtune sample`` does: numbered images, ``grid.png`` and ``prompts.jsonl`` in ``cfg.output_dir``.

    Numbering goes on after the images that are there, so that nothing is written over but the grid.
    """
    prompts = [p for p in [*cfg.prompt, *read_prompts(cfg.prompt_file)] for _ in range(cfg.num_images_per_prompt)]
    found = [parse_adapter(text) for text in cfg.adapter]
    model = base_of(cfg, found)
    try:
        cfg.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {cfg.output_dir}: cannot be written ({error.strerror})") from None
    pipeline = load_pipeline(cfg, model)
    load_adapters(pipeline, found)
    seeds = [cfg.seed + k for k in range(len(prompts))]
    chunks = range(0, len(prompts), cfg.batch_size)
    taken = [int(p.stem) for p in cfg.output_dir.glob("*.png") if re.fullmatch(r"\d{5,}", p.stem)]
    number = max(taken, default=-1) + 1
    images: list[Image.Image] = []
    with (cfg.output_dir / "prompts.jsonl").open("a", encoding="utf-8") as listed:
        for first in track(chunks, "Sampling", transient=True, disable=not sys.stderr.isatty()):
            here = slice(first, first + cfg.batch_size)
            drawn = generate(
                pipeline,
                prompts[here],
                seeds[here],
                steps=cfg.steps,
                guidance_scale=cfg.guidance_scale,
                negative_prompt=cfg.negative_prompt,
                guidance_rescale=cfg.guidance_rescale,
                batch_size=cfg.batch_size,
                width=cfg.width,
                height=cfg.height,
            )
            for image, prompt, seed in zip(drawn, prompts[here], seeds[here], strict=True):
                name = f"{number + len(images):05d}.png"
                image.save(cfg.output_dir / name, pnginfo=described(cfg, model, prompt, seed))
                listed.write(json.dumps({"file_name": name, "text": prompt, "seed": seed}, ensure_ascii=False) + "\n")
                images.append(image)
    save_sheet(grid(images, prompts), cfg.output_dir / "grid.png")
    print(f"{len(images)} images in {cfg.output_dir}, side by side in {cfg.output_dir / 'grid.png'}")


def described(cfg: SampleConfig, model: str, prompt: str, seed: int) -> PngInfo:
    """How an image was made, as text in its PNG."""
    info = PngInfo()
    made = {"prompt": prompt, "seed": seed, "model": model, "adapter": cfg.adapter, "scheduler": cfg.scheduler}
    made |= {"steps": cfg.steps, "guidance_scale": cfg.guidance_scale, "negative_prompt": cfg.negative_prompt}
    info.add_itxt("parameters", json.dumps(made, ensure_ascii=False))
    return info


def read_prompts(file: Path | None) -> list[str]:
    """The lines of a prompt file that hold something."""
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {file}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"--prompt-file {file}: {error.strerror}") from None
    if not any(lines):
        raise UserError(f"--prompt-file {file}: holds no prompt")
    return [line for line in lines if line]


# ---- the base ------------------------------------------------------------------------------------------


def base_of(cfg: SampleConfig, found: list[tuple[str, float]]) -> str:
    """The base to use: the one asked for, else the one that an adapter's run folder was trained on, else tiny."""
    if cfg.model != "auto":
        return cfg.model
    for place, _ in found:
        config = Path(place) / "config.yaml"
        if config.is_file():
            return yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
    return "tiny"


def load_pipeline(cfg: SampleConfig, model: str) -> Any:
    """A stock text-to-image pipeline on the best device there is, with the scheduler that ``cfg`` asks for."""
    from diffusers import AutoencoderKL, DiffusionPipeline

    families.hush()
    source = families.resolve_model(model)
    dtype = DTYPES[cfg.mixed_precision]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.mixed_precision == "fp16" and device == "cpu":
        raise UserError("--mixed-precision fp16: needs a GPU; bf16 works on a CPU")
    more: dict[str, Any] = {"safety_checker": None} if "safety_checker" in families.model_index(source, cfg) else {}
    try:
        if cfg.vae:
            more["vae"] = AutoencoderKL.from_pretrained(cfg.vae, dtype=dtype, cache_dir=cfg.cache_dir)
        pipeline = DiffusionPipeline.from_pretrained(
            source, revision=cfg.revision, variant=cfg.variant, cache_dir=cfg.cache_dir, dtype=dtype, **more
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: {str(error).splitlines()[0]}") from None
    if cfg.scheduler:
        pipeline.scheduler = other_scheduler(cfg.scheduler, pipeline.scheduler)
    return pipeline.to(device)


def other_scheduler(name: str, own: Any) -> Any:
    """Scheduler ``name`` with the base's betas, prediction type, spacing and zero terminal SNR."""
    import diffusers

    if own.config.get("rescale_betas_zero_snr") and name in CANNOT_END_IN_NOISE:
        raise UserError(f"--scheduler {name}: cannot do this base's zero terminal SNR; ddim, dpm++ and euler can")
    return getattr(diffusers, SCHEDULERS[name]).from_config(own.config)


# ---- adapters ------------------------------------------------------------------------------------------


def parse_adapter(text: str) -> tuple[str, float]:
    """``runs/lora=0.8`` as (``runs/lora``, 0.8); the weight is 1 where there is none."""
    place, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return place, float(weight)
    except ValueError:
        raise UserError(f"--adapter {text}: the weight after = must be a number") from None


def load_adapters(pipeline: Any, found: list[tuple[str, float]]) -> None:
    """Put adapters on a pipeline, each with its weight.

    Raises:
        UserError: a file is missing, a pickle, or fits none or only some of the model's modules; diffusers would
            load such a file with no effect and no word.
    """
    for number, (place, _) in enumerate(found):
        path = Path(place)
        name = f"adapter_{number}"
        if path.suffix in families.PICKLES:
            raise UserError(f"--adapter {place}: a pickle can run code when it is read; ask for a .safetensors file")
        if path.is_dir() and not (path / adapters.FILE).is_file():
            raise UserError(f"--adapter {place}: no {adapters.FILE} in that folder")
        if not path.exists() and (place.count("/") != 1 or place[0] in "./~"):
            raise UserError(f"--adapter {place}: no such file or folder; a Hub id is written user/name")
        file = path / adapters.FILE if path.is_dir() else path
        try:
            if file.is_file():
                saved, _ = adapters.read_adapter(file)
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
                modules = count_adapted(pipeline, name)
                wanted = len({key.split(".lora")[0] for key in saved})
                if modules < wanted:
                    raise UserError(f"--adapter {place}: {modules} of its {wanted} modules are in this base")
            else:
                pipeline.load_lora_weights(place, adapter_name=name)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"--adapter {place}: {str(error).strip().splitlines()[0]}") from None
    if found:
        pipeline.set_adapters([f"adapter_{k}" for k in range(len(found))], [weight for _, weight in found])


def count_adapted(pipeline: Any, name: str) -> int:
    """How many modules carry adapter ``name``."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(name in getattr(m, "lora_A", {}) for part in parts for m in part.modules())
