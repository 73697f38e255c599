"""A table of images over two settings (``--xy``), such as the weight of the adapter and its training step."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.models.loading import split_weight
from sdtune.run.artefacts import ARTEFACT, recorded
from sdtune.run.checkpoints import NAME
from sdtune.run.contact_sheet import grid, save_sheet
from sdtune.sampling.prompts import Prompt, read_prompts
from sdtune.sampling.sample import PromptJob, best_of_runs, with_base

AXES = {"scale": float, "step": int, "guidance": float, "seed": int}
"""What a table can go over, and the kind of its values."""


class Axis(NamedTuple):
    name: str
    values: list[float]


def draw_tables(cfg: SampleConfig) -> list[Path]:
    """A table for each prompt: columns go over the first axis of ``cfg.xy``, rows over the second.

    Raises:
        UserError: an axis or a value that there is not, or a step whose adapter was not kept.
    """
    across, down = axes(cfg.xy)
    cfg = with_base(best_of_runs(cfg))
    prompts = read_prompts(cfg)
    places = list(itertools.product(down.values, across.values))
    settings = [dict(zip((down.name, across.name), place, strict=True)) for place in places]
    configs = [with_settings(cfg, chosen) for chosen in settings]
    captions = [", ".join(f"{name} {chosen[name]:g}" for name in (across.name, down.name)) for chosen in settings]
    images = draw(configs, prompts)
    files = []
    for k, of_prompt in enumerate(zip(*images, strict=True)):
        files.append(cfg.output_dir / (f"xy-{k + 1}.png" if len(prompts) > 1 else "xy.png"))
        save_sheet(grid(of_prompt, captions, columns=len(across.values)), files[-1])
    return files


def axes(given: Sequence[str]) -> tuple[Axis, Axis]:
    """The two axes, as ``scale=0.4,0.7`` says one."""
    found = []
    for text in given:
        name, _, values = text.partition("=")
        if name not in AXES:
            raise UserError(f"--xy {text}: begin with one of {', '.join(f'{axis}=' for axis in AXES)}")
        try:
            found.append(Axis(name, [AXES[name](value) for value in values.split(",")]))
        except ValueError:
            raise UserError(f"--xy {text}: give numbers with commas between them, such as {name}=1,2,3") from None
    if len(found) != 2 or found[0].name == found[1].name:
        raise UserError("--xy: give two different axes, such as --xy scale=0.4,0.7,1 step=200,400,600")
    return found[0], found[1]


def with_settings(cfg: SampleConfig, chosen: dict[str, float]) -> SampleConfig:
    """The call with the settings of one place of the table."""
    more: dict[str, Any] = {}
    if "guidance" in chosen:
        more["guidance_scale"] = chosen["guidance"]
    if "seed" in chosen:
        more["seed"] = int(chosen["seed"])
    if chosen.keys() & {"scale", "step"}:
        if not cfg.adapter:
            raise UserError("--xy: scale and step are of an adapter; add --adapter RUN")
        parts = [split_weight(adapter) for adapter in cfg.adapter]
        if "step" in chosen:
            parts = [(str(of_step(Path(where), int(chosen["step"]))), weight) for where, weight in parts]
        scale = chosen.get("scale", 1.0)
        more["adapter"] = [f"{where}={weight * scale:g}" for where, weight in parts]
    return cfg.model_copy(update=more)


def of_step(run: Path, step: int) -> Path:
    """The folder with the artefact of a step: a run's own, or one of those that ``--export-steps`` kept."""
    exports = {int(f.name.removeprefix("step-")): f for f in (run / "exports").glob("step-*") if NAME.fullmatch(f.name)}
    last = recorded(run)[0] if (run / ARTEFACT).is_file() else None
    kept = exports | ({last: run} if last is not None else {})
    if step not in kept:
        steps = ", ".join(map(str, sorted(kept))) or "none"
        raise UserError(f"--xy step={step}: {run} has steps {steps}; train with --export-steps to keep more")
    return kept[step]


def draw(configs: Sequence[SampleConfig], prompts: Sequence[Prompt]) -> list[list[Image.Image]]:
    """The images of each place and prompt; those with the same adapters are drawn together, so these load once."""
    drawn: dict[int, list[Image.Image]] = {}
    order = sorted(range(len(configs)), key=lambda k: configs[k].adapter)
    for _, group in itertools.groupby(order, key=lambda k: configs[k].adapter):
        places = list(group)
        job = PromptJob(configs[places[0]], prompts)
        for k in places:
            job.set_up(configs[k], prompts)
            drawn[k] = job.draw(slice(None), lambda share: None)
    return [drawn[k] for k in range(len(configs))]
