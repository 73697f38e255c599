"""``sdtune sample``: a base model, adapters with weights, and prompts, to images.

`generate` also draws the previews of training, so a preview is what the artefact will give. Image k of a call
starts from the noise of ``torch.Generator("cpu").manual_seed(seed + k)``, whatever the batch size, so stock
diffusers repeats any one of them:

    pipe(prompt, num_inference_steps=25, guidance_scale=5.0,
         generator=torch.Generator("cpu").manual_seed(seed + k)).images[0]
"""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import Progress

from sdtune.configs import UserError
from sdtune.loading import load_adapters, load_embeddings, load_pipeline, split_weight
from sdtune.samplers import make_scheduler
from sdtune.sheets import grid
from sdtune.verbs import SampleConfig


def sample(cfg: SampleConfig) -> list[Path]:
    """Make the images of ``cfg`` and return their files.

    ``output_dir`` receives ``00000.png``, ``00001.png``, ...; ``prompts.jsonl`` with the ``file_name``,
    ``text`` and ``seed`` of each; and ``grid.png``, a sheet of this call's images. Nothing but the sheet is
    overwritten: a second call into the same folder goes on numbering where the first one ended.
    """
    prompts = [p for p in read_prompts(cfg) for _ in range(cfg.num_images_per_prompt)]
    cfg = _with_base(cfg)
    pipe = load_pipeline(cfg)
    load_adapters(pipe, cfg.adapter)
    load_embeddings(pipe, cfg.embedding, cfg.adapter)
    try:
        cfg.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {cfg.output_dir}: cannot be written ({error.strerror})") from error
    if cfg.scheduler:
        pipe.scheduler = make_scheduler(cfg.scheduler, pipe.scheduler)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Sampling", total=1.0)
        images = generate(
            pipe,
            prompts,
            [cfg.seed + k for k in range(len(prompts))],
            steps=cfg.steps,
            guidance_scale=cfg.guidance_scale,
            negative_prompt=cfg.negative_prompt,
            guidance_rescale=cfg.guidance_rescale,
            batch_size=cfg.batch_size,
            width=cfg.width,
            height=cfg.height,
            progress=lambda share: bar.update(task, completed=share),
        )
    taken = [int(p.stem) for p in cfg.output_dir.glob("*.png") if re.fullmatch(r"\d{5,}", p.stem)]
    first, files = max(taken, default=-1) + 1, []
    with (cfg.output_dir / "prompts.jsonl").open("a", encoding="utf-8") as out:
        for k, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            files.append(cfg.output_dir / f"{first + k:05d}.png")
            info = PngInfo()
            info.add_text("parameters", _parameters(cfg, pipe, prompt, cfg.seed + k, image))
            image.save(files[-1], pnginfo=info)
            line = {"file_name": files[-1].name, "text": prompt, "seed": cfg.seed + k}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    grid(images, prompts).save(cfg.output_dir / "grid.png")
    return files


def tell(cfg: SampleConfig) -> str:
    files = sample(cfg)
    return f"{len(files)} images in {cfg.output_dir}, side by side in {cfg.output_dir / 'grid.png'}"


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
    progress: Callable[[float], None] | None = None,
) -> list[Image.Image]:
    """One image for each prompt, in order; image k has the noise of ``seeds[k]``.

    Modules in training mode are put in evaluation mode, and back. ``progress`` is called with the share done,
    0 to 1. Raises `UserError` for what this pipeline cannot do: a size, a rescale, a number of steps.
    """
    if (width is None) != (height is None):  # diffusers would take its own for both
        raise UserError("width and height: give both, or neither for the base's own")
    accepted = inspect.signature(pipe.__call__).parameters
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    options |= {"width": width, "height": height, "guidance_rescale": guidance_rescale or None}
    options = {k: v for k, v in options.items() if v is not None}
    if refused := [k for k in options if k not in accepted]:
        raise UserError(f"{type(pipe).__name__} has no {', '.join(refused)}: leave it out")
    pipe.set_progress_bar_config(disable=True)
    modules = [m for c in pipe.components.values() if isinstance(c, torch.nn.Module) for m in c.modules()]
    training = [m for m in modules if m.training]
    images: list[Image.Image] = []
    try:
        for m in training:
            m.training = False
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            if progress:
                options["callback_on_step_end"] = _reporter(progress, len(images), len(batch), len(prompts))
            noise = [torch.Generator("cpu").manual_seed(s) for s in seeds[start : start + batch_size]]
            images += pipe(
                batch,
                # None, not "": SDXL takes zeros for an absent negative prompt, and so do its users
                negative_prompt=[negative_prompt] * len(batch) if negative_prompt else None,
                generator=noise,
                **options,
            ).images
    except ValueError as error:  # diffusers checks sizes and numbers of steps, in words that name them
        raise UserError(f"{type(pipe).__name__}: {str(error).splitlines()[0]}") from error
    finally:
        for m in training:
            m.training = True
    return images


def read_prompts(cfg: SampleConfig) -> list[str]:
    """The prompts of ``cfg`` and then those of its file, blank lines left out; never empty."""
    prompts = list(cfg.prompt)
    if cfg.prompt_file:
        try:
            lines = cfg.prompt_file.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"--prompt-file {cfg.prompt_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt-file {cfg.prompt_file}: not UTF-8 at byte {error.start}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompt-file {cfg.prompt_file}: no prompt in it")
    return prompts


def _with_base(cfg: SampleConfig) -> SampleConfig:
    """``cfg`` with what ``auto`` stands for: the model of the first run among the adapters, with its VAE."""
    if cfg.model != "auto":
        return cfg
    for text in [*cfg.adapter, *cfg.embedding]:
        record = Path(split_weight(text)[0]) / "config.yaml"
        if record.is_file():
            run = yaml.safe_load(record.read_text(encoding="utf-8"))
            base = {k: run[k] for k in ("model", "revision", "variant", "vae") if run.get(k) is not None}
            return cfg.model_copy(update=base)
    return cfg.model_copy(update={"model": "tiny"})


def _reporter(progress: Callable[[float], None], done: int, batch: int, total: int) -> Callable[..., dict]:
    def report(pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        progress((done + batch * (step + 1) / pipe.num_timesteps) / total)
        return tensors

    return report


def _parameters(cfg: SampleConfig, pipe: DiffusionPipeline, prompt: str, seed: int, image: Image.Image) -> str:
    """How an image came about, in the layout that image viewers read from the text chunk ``parameters``."""
    facts = {"Steps": cfg.steps, "Sampler": type(pipe.scheduler).__name__, "CFG scale": cfg.guidance_scale}
    facts |= {"Seed": seed, "Size": f"{image.width}x{image.height}", "Model": cfg.model}
    if cfg.guidance_rescale:
        facts["CFG rescale"] = cfg.guidance_rescale
    if cfg.adapter:
        facts["Adapters"] = " ".join(cfg.adapter)
    negative = f"Negative prompt: {cfg.negative_prompt}\n" if cfg.negative_prompt else ""
    return f"{prompt}\n{negative}{', '.join(f'{k}: {v}' for k, v in facts.items())}"
