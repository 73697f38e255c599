"""How good the students of `few_steps.py` are: a function a method, from the folder of its run to rows of a table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline
from digits import UNCONDITIONAL, Judge
from torch import Tensor

from sdtune.config.verbs import SampleConfig
from sdtune.diffusion.noise_levels import Levels, denoiser
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.pixel_sampler import draw, draw_consistency, to_images
from sdtune.diffusion.schedulers import lcm_scheduler
from sdtune.evaluation.distances import frechet
from sdtune.evaluation.features import embed, load_network
from sdtune.evaluation.toy_score import score
from sdtune.models.loading import load_adapters, load_pipeline
from sdtune.run.contact_sheet import grid

PICTURES, IMAGES = 100, 500
TEACHER_GUIDANCE = 3.0
"""Under which `tiny` follows captions best."""

Rows = list[tuple[str, float, str, bool]]


def at_least(what: str, value: float, bar: float) -> tuple[str, float, str, bool]:
    return what, value, f">= {bar:g}", value >= bar


def at_most(what: str, value: float, bar: float) -> tuple[str, float, str, bool]:
    return what, value, f"<= {bar:g}", value <= bar


# ---- tiny --------------------------------------------------------------------------------------------


def follows(rows: Rows, name: str, pipe: DiffusionPipeline, steps: int, guidance: float) -> dict[str, float]:
    """How often the picture is what the caption says, which becomes two rows."""
    shares, _, _ = score(pipe, PICTURES, steps=steps, guidance=guidance)
    rows.append((f"{name}, {steps} steps: all right", shares["all"], "", True))
    rows.append((f"{name}, {steps} steps: a known shape, colours right", shares["known"], "", True))
    return shares


def tiny() -> DiffusionPipeline:
    """The teacher with LCM's sampler, which asks it twice a step; its students are asked once."""
    teacher = load_pipeline(SampleConfig(model="tiny", prompt=["-"]))
    teacher.scheduler = lcm_scheduler(teacher.scheduler)
    return teacher


def lcm(run: Path) -> Rows:
    rows: Rows = []
    teacher = tiny()
    for steps in (1, 4):
        follows(rows, "tiny, guidance 3, LCM's sampler", teacher, steps, TEACHER_GUIDANCE)
    student = load_pipeline(SampleConfig(model=str(run), prompt=["-"]))
    found = {steps: follows(rows, "LCM, told guidance 3", student, steps, TEACHER_GUIDANCE) for steps in (1, 2, 4)}
    return [
        *rows,
        at_least("LCM, 4 steps: all right", found[4]["all"], 0.85),
        at_least("LCM, 1 step: ground right", found[1]["ground"], 0.95),
        at_least("LCM, 1 step: a known shape, colours right", found[1]["known"], 0.70),
    ]


def lcm_lora(run: Path) -> Rows:
    rows: Rows = []
    student = tiny()
    load_adapters(student, [str(run)])
    found = {steps: follows(rows, "LCM-LoRA", student, steps, 1.0) for steps in (1, 2, 4)}
    return [*rows, at_least("LCM-LoRA, 4 steps: all right", found[4]["all"], 0.8)]


def reflow(run: Path) -> Rows:
    """Of `tiny-flow` and of its student, whose paths are straight."""
    rows: Rows = []
    base, student = (load_pipeline(SampleConfig(model=name, prompt=["-"])) for name in ("tiny-flow", str(run)))
    before = {steps: follows(rows, "tiny-flow, guidance 3", base, steps, TEACHER_GUIDANCE) for steps in (1, 2, 25)}
    after = {steps: follows(rows, "reflow", student, steps, 1.0) for steps in (1, 2)}
    return [*rows, at_least("reflow in 2 steps over its base in 25", after[2]["all"] / before[25]["all"], 0.9)]


# ---- digits ------------------------------------------------------------------------------------------


def distance_to(judge: Judge) -> Callable[[Tensor], float]:
    """The Frechet distance of images to the real digits."""
    network = load_network("random-conv")
    real = embed(judge.real, network)
    return lambda images: frechet(embed(images, network), real)


def progressive(run: Path) -> Rows:
    rows: Rows = []
    distance, seeds = distance_to(Judge()), range(IMAGES)
    teacher = DDPMPipeline.from_pretrained(UNCONDITIONAL)
    ddim = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing")
    first, second = sorted((run / "exports").iterdir())[:2]  # each of a halving; that of the last is the run's own
    for (steps, place), bar in zip({4: first, 2: second, 1: run}.items(), (0.6, 0.25, 0.10), strict=True):
        student = DDPMPipeline.from_pretrained(place)
        drawn = draw(student.unet, student.scheduler, seeds, steps=steps, batch_size=IMAGES)
        grid(to_images(drawn[:40]), None, 10).save(run / f"drawn-{steps}.png")
        before = distance(draw(teacher.unet, ddim, seeds, steps=steps, batch_size=IMAGES))
        after = distance(drawn)
        rows.append((f"teacher, DDIM, {steps} steps: Frechet", before, "", True))
        rows.append((f"progressive, {steps} steps: Frechet", after, "", True))
        rows.append(at_most(f"progressive over DDIM, {steps} steps", after / before, bar))
    return rows


def consistency(run: Path) -> Rows:
    rows, pipe = list[tuple[str, float, str, bool]](), ConsistencyModelPipeline.from_pretrained(run)
    teacher, judge = DDPMPipeline.from_pretrained(UNCONDITIONAL), Judge()
    distance = distance_to(judge)
    before = {steps: distance(by_teacher(teacher, pipe.scheduler, steps, range(IMAGES))) for steps in (1, 2, 4)}
    rows += [(f"teacher in its place, {steps} steps: Frechet", x, "", True) for steps, x in before.items()]
    after, measured = by_student(run, judge, {})
    return [*rows, *measured, at_most("distilled over teacher, 2 steps", after[2] / before[2], 0.4)]


def consistency_scratch(run: Path) -> Rows:
    return by_student(run, Judge(), {1: 25.0, 2: 20.0})[1]


def by_student(run: Path, judge: Judge, bars: dict[int, float]) -> tuple[dict[int, float], Rows]:
    """Distances of a consistency model by steps, and the rows of them."""
    rows: Rows = []
    pipe, found, distance = ConsistencyModelPipeline.from_pretrained(run), {}, distance_to(judge)
    for steps in (1, 2, 4):
        drawn = draw_consistency(pipe.unet, pipe.scheduler, range(IMAGES), steps=steps, batch_size=IMAGES)
        grid(to_images(drawn[:40]), None, 10).save(run / f"drawn-{steps}.png")
        found[steps] = distance(drawn)
        what = f"{run.name}, {steps} steps: Frechet"
        rows.append(at_most(what, found[steps], bars[steps]) if steps in bars else (what, found[steps], "", True))
        if steps == 2:
            kinds = len(set(judge.probabilities(drawn).argmax(1)))
            rows.append((f"{run.name}, {steps} steps: digits", kinds, "10", kinds == 10))
    return found, rows


@torch.no_grad()
def by_teacher(teacher: DDPMPipeline, scheduler: Any, steps: int, seeds: Sequence[int]) -> Tensor:
    """Images of the sampler of consistency models, which asks the diffusion model in their place."""
    levels = Levels()
    process = DDPM(teacher.scheduler.alphas_cumprod, teacher.scheduler.config.prediction_type)
    denoise = denoiser(process, lambda x, t: teacher.unet(x, t).sample)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators]) * levels.sigma_max
    for sigma, lower in zip(scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        image = denoise(x, sigma.expand(len(x))).clamp(-1, 1)
        noise = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators])
        x = image + noise * (lower**2 - levels.sigma_min**2).clamp(min=0).sqrt()
    return x.clamp(-1, 1)


MEASURE: dict[str, Callable[[Path], Rows]] = {
    "lcm": lcm,
    "lcm-lora": lcm_lora,
    "reflow": reflow,
    "consistency-scratch": consistency_scratch,
    "progressive": progressive,
    "consistency": consistency,
}
