"""``sdtune sample``: draws images of prompts with a base model and adapters (``sample_pixels`` for pixel models).

`generate` also draws the previews of training, so a preview is what the artefact will draw. Image k of a call
starts from the noise of ``torch.Generator("cpu").manual_seed(seed + k)``, whatever the batch size, so diffusers
draws the same image:

    pipe(prompt, num_inference_steps=25, guidance_scale=5.0,
         generator=torch.Generator("cpu").manual_seed(seed + k)).images[0]
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import Progress

from sdtune.config.fields import flag
from sdtune.config.sections import UserError
from sdtune.config.untrusted import echo
from sdtune.config.verbs import SampleConfig
from sdtune.diffusion.schedulers import lcm_scheduler, make_scheduler
from sdtune.models import families
from sdtune.models.clip_skip import skip_layers
from sdtune.models.controls import read_image
from sdtune.models.loading import load_adapters, load_embeddings, load_pipeline, read_sampling, split_weight
from sdtune.models.prompt_embeddings import Reading
from sdtune.models.prompts import check_negative, check_prompts, takes_guidance_as_input, window_of
from sdtune.run.artefacts import of_best
from sdtune.run.contact_sheet import grid, save_sheet
from sdtune.run.sampling_file import Sampling
from sdtune.run.usage import DECODER, PRIOR
from sdtune.sampling.enlarge import Cascade, EnlargeJob, is_enlarger
from sdtune.sampling.generate import generate
from sdtune.sampling.image_inputs import check_images, images_of
from sdtune.sampling.image_text import parameters
from sdtune.sampling.prompts import Prompt, read_prompts
from sdtune.sampling.sample_pixels import PixelJob, of_pixels
from sdtune.sampling.sample_unclip import UnclipJob

STEPS, GUIDANCE = 25, 5.0
"""Where neither the options nor the ``sampling.json`` of a distilled model say otherwise."""
SHOWN = 100
"""Images of a call that are held in memory for its sheet, at most."""
OF_LATENTS = (
    "adapter embedding unet vae control image mask_image image_guidance_scale negative_prompt width height clip_skip "
    "long_prompts prompt_weights"
)
OUT_OF_RANGE = "out_of_range dynamic_thresholding_ratio sample_max_value"
OF_PIXELS = "classes classifier clip_model eta variance_type strip interpolate"
OF_UNCLIP = "prior prior_steps prior_guidance_scale"
"""Options that only one kind of model uses."""
NOT_OF_ENLARGERS = " ".join(
    name
    for name in f"guidance_scale guidance_rescale {OF_PIXELS} {OF_LATENTS} {OF_UNCLIP}".split()
    if name not in ("image", "variance_type")
)
"""Options that a model that enlarges has no use for."""
NOT_OF_UNCLIP = (
    "embedding unet vae control mask_image image_guidance_scale clip_skip long_prompts prompt_weights "
    "guidance_rescale classes classifier clip_model eta variance_type strip interpolate_timestep " + OUT_OF_RANGE
)
"""Options that a decoder of unCLIP has no use for."""


def sample(cfg: SampleConfig) -> list[Path]:
    """Make the images of ``cfg`` and return their files.

    ``output_dir`` receives ``00000.png``, ``00001.png``, ... as they are made; ``prompts.jsonl`` with the
    ``file_name``, ``text`` and ``seed`` of each; and ``grid.png``, a sheet of this call's first hundred images.
    Nothing but sheets is overwritten: a second call into the same folder continues the numbering.
    """
    prompts = read_prompts(cfg)
    cfg = with_base(best_of_runs(cfg))
    source = families.resolve_model(cfg.model)
    job = job_of(cfg, families.model_index(source, cfg), prompts)
    if cfg.then:
        job = Cascade(cfg, job)
    try:
        cfg.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {cfg.output_dir}: cannot be written ({error.strerror})") from error
    used_numbers = [int(p.stem) for p in cfg.output_dir.glob("*.png") if re.fullmatch(r"\d{5,}", p.stem)]
    first, total, files = max(used_numbers, default=-1) + 1, len(job.records), []
    shown: list[Image.Image] = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Sampling", total=float(total))

        def report(share: float) -> None:
            bar.update(task, completed=len(files) + share * min(cfg.batch_size, total - len(files)))

        for start in range(0, total, cfg.batch_size):
            rows = slice(start, start + cfg.batch_size)
            images = job.draw(rows, report)
            shown += images[: SHOWN - len(shown)]
            with (cfg.output_dir / "prompts.jsonl").open("a", encoding="utf-8") as lines:
                for image, record in zip(images, job.records[rows], strict=True):
                    files.append(cfg.output_dir / f"{first + len(files):05d}.png")
                    info = PngInfo()
                    info.add_text("parameters", parameters(cfg, job.facts, record, image))
                    image.save(files[-1], pnginfo=info)
                    lines.write(json.dumps({"file_name": files[-1].name} | record, ensure_ascii=False) + "\n")
    for name, sheet in job.sheets(shown).items():
        save_sheet(sheet, cfg.output_dir / name)
    return files


def job_of(cfg: SampleConfig, index: dict[str, Any], prompts: Sequence[Prompt]) -> "Job":
    """What draws the images of a call, by the ``model_index.json`` of its model.

    Raises:
        UserError: an option that this kind of model does not use, among much else.
    """
    if index.get("_class_name") == PRIOR:
        raise UserError(f"--model {cfg.model}: a prior, which draws nothing; give it as --prior, and its decoder here")
    if index.get("_class_name") == DECODER:
        refuse_options(cfg, NOT_OF_UNCLIP if cfg.then else f"{NOT_OF_UNCLIP} noise_level", "a decoder of unCLIP")
        return UnclipJob(cfg, prompts)
    pixels, enlarges = of_pixels(index), is_enlarger(index)
    if cfg.noise_level is not None and pixels and not cfg.then:
        raise UserError(f"--noise-level: is for models that enlarge, which {cfg.model} is not; leave it out")
    if enlarges:
        refuse_options(cfg, NOT_OF_ENLARGERS, "a model that enlarges")
        if prompts:
            raise UserError(f"--prompt: {cfg.model} enlarges an image, and reads no text; leave it out")
        return EnlargeJob(cfg)
    of_others = f"{OF_LATENTS if pixels else f'{OF_PIXELS} {OUT_OF_RANGE}'} {OF_UNCLIP}"
    refuse_options(cfg, of_others, "a model of pixels" if pixels else "a text-to-image model")
    if pixels and any(prompt.settings for prompt in prompts):
        raise UserError(f"--prompt-file: its lines have options, which a model of pixels, as {cfg.model}, does not use")
    return PixelJob(cfg, [prompt.text for prompt in prompts]) if pixels else PromptJob(cfg, prompts)


class Job(Protocol):
    """The images of one call."""

    records: list[dict[str, Any]]
    """``text`` and ``seed`` of each."""

    @property
    def facts(self) -> dict[str, Any]:
        """How all of them were made, for their text chunks."""

    def draw(self, rows: slice, progress: Callable[[float], None]) -> list[Image.Image]: ...
    def sheets(self, images: Sequence[Image.Image]) -> dict[str, Image.Image]: ...


class PromptJob:
    """Prompts for a text-to-image model, with adapters on it."""

    def __init__(self, cfg: SampleConfig, prompts: Sequence[Prompt]):
        if not prompts:
            raise UserError("there is nothing to draw: give --prompt or --prompt-file")
        published = (read_sampling(cfg, text) for text in (*cfg.adapter, cfg.model))
        self.own = next(filter(None, published), Sampling(STEPS))
        self.set_up(cfg, prompts)
        self.pipe = load_pipeline(cfg)
        kind = type(self.pipe).__name__
        family = families.family_class(kind)
        family.check_reading(cfg, kind)
        check_images(self.pipe, cfg, self.images)
        if cfg.clip_skip:
            skip_layers(self.pipe.text_encoder, cfg.clip_skip, cfg.model)
        load_adapters(self.pipe, cfg.adapter, cfg.clip_skip)
        words = load_embeddings(self.pipe, cfg.embedding, cfg.adapter)
        texts = " ".join([cfg.negative_prompt, *(f"{p.text} {p.settings.get('negative_prompt', '')}" for p in prompts)])
        if unused := [word for word in words if word.lower() not in texts.lower()]:
            notice = f"no prompt has {', '.join(unused)} in it: such a word has no effect unless a prompt says it"
            echo(f"warning: {notice}", err=True)
        window = None if cfg.long_prompts else window_of(self.pipe, family.max_tokens, family.reads_windows)
        option = "--prompt" if cfg.prompt else "--prompt-file"
        check_prompts(option, [prompt.text for prompt in prompts], window, echo, cfg.prompt_weights)
        check_prompts("--negative-prompt", [cfg.negative_prompt], window, echo, cfg.prompt_weights)
        if cfg.negative_prompt and takes_guidance_as_input(self.pipe):
            raise UserError(f"--negative-prompt: {cfg.model} is told its guidance and takes none; leave it out")
        check_negative(cfg.negative_prompt, self.scale, "--negative-prompt", echo)
        for own in (prompt.settings for prompt in prompts if "negative_prompt" in prompt.settings):
            check_prompts("--prompt-file: --n", [own["negative_prompt"]], window, echo, cfg.prompt_weights)
            check_negative(own["negative_prompt"], own.get("guidance_scale", self.scale), "--prompt-file: --n", echo)
        if cfg.scheduler:
            self.pipe.scheduler = make_scheduler(cfg.scheduler, self.pipe.scheduler)
        if self.own.lcm is not None and cfg.scheduler in (None, "lcm"):
            self.pipe.scheduler = lcm_scheduler(self.pipe.scheduler, **self.own.lcm)

    def set_up(self, cfg: SampleConfig, prompts: Sequence[Prompt]) -> None:
        """From here on draw by ``cfg``, whose model and adapters are the same."""
        several = [prompt for prompt in prompts for _ in range(cfg.num_images_per_prompt)]
        self.cfg = cfg
        seeds = [  # a seed in the file is that of the prompt's first image
            p.settings["seed"] + k % cfg.num_images_per_prompt if "seed" in p.settings else cfg.seed + k
            for k, p in enumerate(several)
        ]
        self.records = [{"text": p.text} | p.settings | {"seed": seed} for p, seed in zip(several, seeds, strict=True)]
        self.images = images_of(cfg, prompts)
        for record, files in zip(self.records, self.images, strict=True):
            if files:
                record["image"] = str(files[0])
        self.control_scales = [split_weight(text, "--control")[1] for text in cfg.control]
        self.steps = cfg.steps or self.own.steps
        own_scale = GUIDANCE if self.own.guidance_scale is None else self.own.guidance_scale
        self.scale = own_scale if cfg.guidance_scale is None else cfg.guidance_scale

    @property
    def facts(self) -> dict[str, Any]:
        sampler = type(self.pipe.scheduler).__name__
        return {"Steps": self.steps, "Sampler": sampler, "CFG scale": self.scale}

    def draw(self, rows: slice, progress: Callable[[float], None]) -> list[Image.Image]:
        """The images ``rows`` of the call; neighbours with the same settings are drawn together."""
        images: list[Image.Image] = []
        left = iter(self.images[rows])
        for settings, group in itertools.groupby(self.records[rows], self._settings):
            records = list(group)
            given = list(itertools.islice(left, len(records)))
            images += generate(
                self.pipe,
                [record["text"] for record in records],
                [record["seed"] for record in records],
                **settings,
                guidance_rescale=self.cfg.guidance_rescale,
                batch_size=self.cfg.batch_size,
                reading=Reading(self.cfg.long_prompts, self.cfg.prompt_weights),
                progress=progress,
                images=[[read_image(file, f"--image {file}") for file in files] for files in given],
                control_scales=self.control_scales,
                image_guidance_scale=self.cfg.image_guidance_scale,
                noise_level=None if self.cfg.then else self.cfg.noise_level,
            )
        return images

    def _settings(self, record: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` for an image: its own, else those of the call."""
        cfg = self.cfg
        call = {"steps": self.steps, "guidance_scale": self.scale, "negative_prompt": cfg.negative_prompt}
        call |= {"width": cfg.width, "height": cfg.height}
        return {name: record.get(name, value) for name, value in call.items()}

    def sheets(self, images: Sequence[Image.Image]) -> dict[str, Image.Image]:
        return {"grid.png": grid(images, [record["text"] for record in self.records[: len(images)]])}


def refuse_options(cfg: SampleConfig, names: str, kind: str) -> None:
    """Raise `UserError` if an option is given that this ``kind`` of model does not use."""
    defaults = {name: field.get_default() for name, field in SampleConfig.model_fields.items()}
    if given := [flag(name) for name in names.split() if getattr(cfg, name) != defaults[name]]:
        raise UserError(f"{', '.join(given)}: not for {kind}, which {cfg.model} is")


def best_of_runs(cfg: SampleConfig) -> SampleConfig:
    """``cfg`` with the folders of the best steps of its runs (``--best``)."""
    if not cfg.best:
        return cfg

    def best(option: str, given: str) -> str:
        where = split_weight(given)[0]
        return str(of_best(option, Path(where))) + given[len(where) :]

    runs = {"adapter": [best("--adapter", a) for a in cfg.adapter]}
    runs |= {"embedding": [best("--embedding", e) for e in cfg.embedding]}
    runs |= {"control": [best("--control", c) for c in cfg.control]}
    model = {} if any(runs.values()) else {"model": best("--model", cfg.model)}
    return cfg.model_copy(update=runs | model)


def with_base(cfg: SampleConfig) -> SampleConfig:
    """``cfg`` with its model; ``auto`` is the base (and VAE) of the first run among adapters, embeddings and parts.

    Prompts are then read as that run read its captions, unless the options say otherwise.
    """
    if cfg.model != "auto":
        return cfg
    parts = [str(part) for part in (cfg.unet, cfg.vae) if part]
    for text in [*cfg.control, *cfg.adapter, *cfg.embedding, *parts]:
        record = Path(split_weight(text)[0]) / "config.yaml"
        if record.is_file():
            run = yaml.safe_load(record.read_text(encoding="utf-8"))
            if run.get("method") == "prior":
                raise UserError(f"--model: {text} is of a prior; name the decoder that draws, and the prior as --prior")
            base = {k: run[k] for k in ("model", "revision", "variant", "vae") if run.get(k) is not None}
            if cfg.vae:
                base["vae"] = cfg.vae
            base |= {k: run[k] for k in ("clip_skip", "long_prompts") if run.get(k) and not getattr(cfg, k)}
            return cfg.model_copy(update=base)
    return cfg.model_copy(update={"model": "tiny"})
