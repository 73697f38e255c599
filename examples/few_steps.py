"""Fifty steps to four, two and one: distils `tiny`, `tiny-flow` and the model of digits, and measures what comes out.

python examples/few_steps.py [--overwrite]        after `make digits`, whose model is the teacher

Two runs train at a time, each on one core. It fails where a method is worse than it was when it was written; the
tables are those of docs/few-steps.md. Of digits the Frechet distance tells (features of the built-in random network),
of `tiny` and `tiny-flow` what a reader of their shapes and colours sees.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline
from digits import UNCONDITIONAL, Judge, print_table, train
from torch import Tensor

from sdtune.config.verbs import SampleConfig
from sdtune.diffusion.noise_levels import Levels, denoiser
from sdtune.diffusion.objective import DDPM
from sdtune.diffusion.pixel_sampler import draw, draw_consistency, to_images
from sdtune.diffusion.schedulers import lcm_scheduler
from sdtune.evaluation.distances import frechet
from sdtune.evaluation.features import embed, load_network
from sdtune.evaluation.toy_score import score
from sdtune.models.families import resolve_model, silence_libraries
from sdtune.models.loading import load_adapters, load_pipeline
from sdtune.run.contact_sheet import grid

RECIPES = {
    "reflow/tiny-flow": "runs/reflow-tiny-flow",
    "lcm/tiny": "runs/lcm-tiny",
    "progressive/digits": "runs/progressive-digits",
    "lcm/tiny-lora": "runs/lcm-tiny-lora",
    "consistency/digits": "runs/consistency-digits",
    "consistency/digits-scratch": "runs/consistency-digits-scratch",
}
"""Each takes one core."""
PICTURES, IMAGES = 100, 500
TEACHER_GUIDANCE = 3.0
"""Under which `tiny` follows captions best."""

Rows = list[tuple[str, float, str, bool]]


def distil(name: str, *words: str) -> None:
    """Run a recipe in a process of its own, and show what it printed if it fails."""
    line = [sys.executable, "-m", "sdtune", name.partition("/")[0], "--config", name, *words]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # two runs of two threads each would wait for one another
    ended = subprocess.run(line, env=one_thread, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(line)}\n{ended.stdout}{ended.stderr}")
    print(f"{name}: trained", flush=True)


def at_least(what: str, value: float, bar: float) -> tuple[str, float, str, bool]:
    return what, value, f">= {bar:g}", value >= bar


def at_most(what: str, value: float, bar: float) -> tuple[str, float, str, bool]:
    return what, value, f"<= {bar:g}", value <= bar


# ---- tiny --------------------------------------------------------------------------------------------


def latent() -> Rows:
    """How often the picture is what the caption says, by steps; the teacher asks twice a step, its students once."""
    rows: Rows = []

    def measured(name: str, pipe: DiffusionPipeline, steps: int, guidance: float) -> dict[str, float]:
        shares, _, _ = score(pipe, PICTURES, steps=steps, guidance=guidance)
        rows.append((f"{name}, {steps} steps: all right", shares["all"], "", True))
        return shares

    teacher = load_pipeline(SampleConfig(model="tiny", prompt=["-"]))
    teacher.scheduler = lcm_scheduler(teacher.scheduler)
    for steps in (1, 4):
        measured("tiny, guidance 3, LCM's sampler", teacher, steps, TEACHER_GUIDANCE)
    student = load_pipeline(SampleConfig(model=RECIPES["lcm/tiny"], prompt=["-"]))
    found = {steps: measured("LCM, told guidance 3", student, steps, TEACHER_GUIDANCE) for steps in (1, 2, 4)}
    rows += [
        at_least("LCM, 4 steps: all right", found[4]["all"], 0.85),
        at_least("LCM, 1 step: ground right", found[1]["ground"], 0.95),
        at_least("LCM, 1 step: a known shape, colours right", found[1]["known"], 0.70),
    ]
    load_adapters(teacher, [RECIPES["lcm/tiny-lora"]])
    found = {steps: measured("LCM-LoRA", teacher, steps, 1.0) for steps in (1, 2, 4)}
    rows.append(at_least("LCM-LoRA, 4 steps: all right", found[4]["all"], 0.8))
    return rows


def flow() -> Rows:
    """The same of `tiny-flow` and of its student, whose paths are straight."""
    rows: Rows = []

    def measured(name: str, model: str, steps: int, guidance: float) -> float:
        pipe = load_pipeline(SampleConfig(model=model, prompt=["-"]))
        shares, _, _ = score(pipe, PICTURES, steps=steps, guidance=guidance)
        rows.append((f"{name}, {steps} steps: all right", shares["all"], "", True))
        return shares["all"]

    base = {steps: measured("tiny-flow, guidance 3", "tiny-flow", steps, TEACHER_GUIDANCE) for steps in (1, 2, 25)}
    found = {steps: measured("reflow", RECIPES["reflow/tiny-flow"], steps, 1.0) for steps in (1, 2)}
    rows.append(at_least("reflow in 2 steps over its base in 25", found[2] / base[25], 0.9))
    return rows


# ---- digits ------------------------------------------------------------------------------------------


def pixels(judge: Judge) -> Rows:
    """Frechet distances to the real digits, by steps."""
    network, rows = load_network("random-conv"), list[tuple[str, float, str, bool]]()
    real, seeds = embed(judge.real, network), range(IMAGES)

    def distance(images: Tensor) -> float:
        return frechet(embed(images, network), real)

    teacher = DDPMPipeline.from_pretrained(UNCONDITIONAL)
    ddim = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing")
    folder = Path(RECIPES["progressive/digits"])
    students = {4: folder / "exports" / "step-000130", 2: folder / "exports" / "step-000260", 1: folder}
    for (steps, place), bar in zip(students.items(), (0.6, 0.25, 0.10), strict=True):
        student = DDPMPipeline.from_pretrained(place)
        drawn = draw(student.unet, student.scheduler, seeds, steps=steps, batch_size=IMAGES)
        grid(to_images(drawn[:40]), None, 10).save(folder / f"drawn-{steps}.png")
        before = distance(draw(teacher.unet, ddim, seeds, steps=steps, batch_size=IMAGES))
        after = distance(drawn)
        rows.append((f"teacher, DDIM, {steps} steps: Frechet", before, "", True))
        rows.append((f"progressive, {steps} steps: Frechet", after, "", True))
        rows.append(at_most(f"progressive over DDIM, {steps} steps", after / before, bar))

    before = {steps: distance(by_teacher(teacher, steps, seeds)) for steps in (1, 2, 4)}
    for name, bars in (("consistency/digits", {}), ("consistency/digits-scratch", {1: 25.0, 2: 20.0})):
        pipe = ConsistencyModelPipeline.from_pretrained(RECIPES[name])
        after = {}
        for steps in before:
            drawn = draw_consistency(pipe.unet, pipe.scheduler, seeds, steps=steps, batch_size=IMAGES)
            grid(to_images(drawn[:40]), None, 10).save(f"{RECIPES[name]}/drawn-{steps}.png")
            after[steps] = distance(drawn)
            if not bars:
                rows.append((f"teacher in its place, {steps} steps: Frechet", before[steps], "", True))
            what = f"{name}, {steps} steps: Frechet"
            rows.append(at_most(what, after[steps], bars[steps]) if steps in bars else (what, after[steps], "", True))
            if steps == 2:
                kinds = len(set(judge.probabilities(drawn).argmax(1)))
                rows.append((f"{name}, {steps} steps: digits", kinds, "10", kinds == 10))
        if not bars:
            rows.append(at_most("distilled over teacher, 2 steps", after[2] / before[2], 0.4))
    return rows


@torch.no_grad()
def by_teacher(teacher: DDPMPipeline, steps: int, seeds: Sequence[int]) -> Tensor:
    """Images of the sampler of consistency models, which asks the diffusion model in their place."""
    levels, scheduler = Levels(), ConsistencyModelPipeline.from_pretrained(RECIPES["consistency/digits"]).scheduler
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


if __name__ == "__main__":
    if not Path(UNCONDITIONAL, "model_index.json").is_file():
        train("ddpm", "--config", "ddpm/digits")
    began = time.monotonic()
    silence_libraries()
    resolve_model("tiny")
    with ThreadPoolExecutor(2) as two:
        list(two.map(lambda name: distil(name, *sys.argv[1:]), RECIPES))
    print(f"trained in {time.monotonic() - began:.0f} seconds")
    met = print_table([*latent(), *flow(), *pixels(Judge())])
    print(f"{time.monotonic() - began:.0f} seconds")
    sys.exit(not met)
