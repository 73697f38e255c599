"""``report.html``: a run on one page, made from the files in its folder. It opens from disk and needs no network.

The template with style and script is ``report.html`` beside this file; this module makes the parts.
"""

import json
import shlex
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

from sdtune import __version__
from sdtune.config.commands import config_class
from sdtune.config.scores import title, which_is_better
from sdtune.config.sections import Run
from sdtune.run import status, step_times, usage
from sdtune.run.artefacts import BEST, artefact, best, by_path, entries
from sdtune.run.base_class import pipeline_class
from sdtune.run.curves import Points, chart, clock, smooth
from sdtune.run.folder import FIRST_LINE, sample_sheets, step_of_sheet
from sdtune.run.metrics_file import read_lines
from sdtune.run.page import Encoded, evenly_spaced, sheet_cells, table, text

MAX_CELLS = 120  # images on the page, about 15 kB each
STATES = {
    "running": "running, step {step} of {total}",
    "interrupted": "interrupted and saved at step {step} of {total}",
    "failed": "failed at step {step} of {total}: {message}",
    "killed": "killed at step {step} of {total}",
    "finished": "finished after {step} steps",
}
MEASURED = {
    *("step", "seconds", "loss", "holdout_loss", "learning_rate", "grad_norm", "skipped_steps"),
    *("images_per_second", "peak_memory", "rest", *step_times.PARTS),
}
"""Keys that the lines of every run have. All other keys are figures of the recipe."""


class Sheet(NamedTuple):
    step: int
    cells: tuple[Encoded, ...]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, from the files that exist there; return its path."""
    config = _load(folder / "config.yaml", {})
    lines = read_lines(folder / "metrics.jsonl")
    sheets, count = _sheets(folder)
    method = config_class(config) if config else None
    command = config.get("method") or (method.method if method else None)
    names = [str(x) for x in (command, config.get("model"), config.get("dataset")) if x]
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(" · ".join(names) or folder.resolve().name),
        heading=" <span>·</span> ".join(map(escape, names)) or escape(folder.resolve().name),
        state=_state(folder, config, lines),
        figures=_figures(folder, lines),
        before_after=_before_after(sheets),
        charts=_charts(lines),
        strip=_strip(sheets, count),
        commands=_commands(folder, config, method),
        config=_config(config, method),
        environment=table("Environment", _load(folder / "environment.json", {}), "Not recorded."),
        version=escape(__version__),
    )
    out = folder / "report.html"
    partial = out.with_name("report.html.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def _load(path: Path, default: Any) -> Any:
    """A file of YAML, or of JSON, by its name."""
    if not path.is_file():
        return default
    text = path.read_text(encoding="utf-8")
    return (json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)) or default


def _series(lines: list[dict[str, Any]], key: str) -> Points:
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]


def _sheets(folder: Path) -> tuple[list[Sheet], int]:
    """Sample sheets by step, of which at most `MAX_CELLS` images are shown, evenly spaced; and how many there are."""
    files = sample_sheets(folder)
    if not files:
        return [], 0
    most = max(2, MAX_CELLS // len(sheet_cells(files[-1])))
    sheets = [Sheet(step_of_sheet(file), sheet_cells(file)) for file in evenly_spaced(files, most)]
    return [s for s in sheets if len(s.cells) == len(sheets[-1].cells)], len(files)


def _resume_command(record: Path, method: type[Run] | None) -> str:
    """The command that continues the run, from the first line of its record."""
    first = record.read_text(encoding="utf-8").partition("\n")[0] if record.exists() else ""
    written = first.removeprefix("# ") if first.startswith(FIRST_LINE) else ""
    return written or f"sdtune {method.method if method else 'METHOD'} --config {shlex.quote(str(record))}"


def _state(folder: Path, config: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """A paragraph that says how far the run is; the page's script reads its attributes while the run goes on."""
    done = max((line["step"] for line in lines), default=0)
    found = status.read(folder)
    if files := artefact(folder):
        sentence, found = f"finished after {done:,} steps; wrote {', '.join(entries(folder, files))}", None
    elif found is None:
        sentence = f"step {done:,}" + (f" of {config['steps']:,}" if config.get("steps") else "")
    else:
        done = max(done, found.step)
        sentence = STATES[found.state].format(step=f"{done:,}", total=f"{found.total:,}", message=found.message)
        if found.seconds_left is not None:
            sentence += f", about {clock(found.seconds_left)} left"
    live = f' data-written="{found.written:.0f}"' if found and found.state == "running" else ""
    if live and found and found.seconds_left is not None:
        live += f' data-ends="{found.written + found.seconds_left:.0f}"'
    return f'<p id="state"{live}>{escape(f"sdtune run in {folder}: {sentence}")}</p>'


def _figures(folder: Path, lines: list[dict[str, Any]]) -> str:
    """The main figures as a list of terms; a figure that was never logged is left out."""
    last = {key: values[-1] for key in ("images_per_second", "seconds") if (values := _series(lines, key))}
    shown = [("Steps", f"{max((line['step'] for line in lines), default=0):,}")]
    if loss := _series(lines, "loss"):
        tail = [value for _, value in loss[-max(1, len(loss) // 20) :]]
        shown.append(("Final loss", f"{sum(tail) / len(tail):.4f}"))
    if holdout := _series(lines, "holdout_loss"):
        shown.append(("Holdout loss", f"{holdout[-1][1]:.4f} <small>from {holdout[0][1]:.4f}</small>"))
    if kept := best(folder):
        shown.append(("Best step", f"{kept[0]:,} <small>in {BEST}/</small>"))
    if rates := sorted(value for _, value in _series(lines, "images_per_second")):
        shown.append(("Throughput", f"{rates[len(rates) // 2]:.3g} <small>images/s</small>"))
    if waits := [value for _, value in _series(lines, "data_wait")]:
        shown.append(("Waiting for data", f"{100 * sum(waits) / len(waits):.1f} <small>%</small>"))
    if memory := _series(lines, "peak_memory"):
        shown.append(("Peak memory", f"{max(m for _, m in memory) / 2**30:.2f} <small>GiB</small>"))
    if "seconds" in last:
        seconds = last["seconds"][1]
        shown.append(("Time", f"{clock(seconds)} <small>{'h' if seconds >= 3600 else 'min'}</small>"))
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown)


def _before_after(sheets: list[Sheet]) -> str:
    if len(sheets) < 2:
        return '<p class="none">There is nothing to compare yet: the run has fewer than two sets of samples.</p>'
    first, last = sheets[0], sheets[-1]
    pairs = ""
    for before, after in zip(first.cells, last.cells, strict=True):
        pairs += (
            '<figure class="pair card"><div>'
            f"<div><p>step {first.step}</p>{before.tag(f'before: {before.caption}')}</div>"
            f'<div class="after"><p>step {last.step}</p>{after.tag(f"after: {after.caption}")}</div></div>'
            f"<figcaption>{escape(after.caption)}</figcaption></figure>"
        )
    scrub = (
        '<label class="scrub" hidden><span>Step on the right</span>'
        f'<input type="range" min="0" max="{len(sheets) - 1}" value="{len(sheets) - 1}"></label>'
    )
    return f'{scrub}<div class="pairs">{pairs}</div>'


def _strip(sheets: list[Sheet], count: int) -> str:
    """A table of samples with a row for each prompt and a column for each step."""
    if not sheets:
        return '<p class="none">No samples yet.</p>'
    heads = "".join(f'<th scope="col" data-step="{s.step}">step {s.step}</th>' for s in sheets)
    rows = ""
    for k, last in enumerate(sheets[-1].cells):
        images = "".join(f"<td>{s.cells[k].tag(f'step {s.step}: {last.caption}')}</td>" for s in sheets)
        rows += f'<tr><th scope="row">{escape(last.caption)}</th>{images}</tr>'
    table = f'<table class="strip"><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    left_out = f'<p class="none">{len(sheets)} of {count} sets shown.</p>' if count > len(sheets) else ""
    return f'<div class="card scroll" tabindex="0" role="region" aria-label="Samples">{table}</div>{left_out}'


def _charts(lines: list[dict[str, Any]]) -> str:
    loss, holdout = _series(lines, "loss"), _series(lines, "holdout_loss")
    if not loss and not holdout:
        return '<p class="none">No step has been logged yet.</p>'
    names = {"data_wait": "waiting for data"}
    shares = {
        names.get(part, part): [(step, 100 * share) for step, share in _series(lines, part)]
        for part in (*step_times.PARTS, "rest")
    }
    charts = [
        ("Loss", "", {"smoothed": smooth(loss), "logged": loss, "holdout": holdout}),
        ("Learning rate", "", {"learning rate": _series(lines, "learning_rate")}),
        ("Gradient norm", "before clipping", {"gradient norm": _series(lines, "grad_norm")}),
        ("Throughput", "images/s", {"images/s": _series(lines, "images_per_second")}),
        ("Time of a step", "% of it", shares),
        *((title(key), which_is_better(key), _with_interval(lines, key)) for key in figures_of(lines)),
    ]
    return (
        '<div class="charts">'
        + "".join(chart(*c, from_zero=c[0] != "Loss") for c in charts if any(c[2].values()))
        + "</div>"
    )


def figures_of(lines: list[dict[str, Any]]) -> list[str]:
    """The names of the scores, and of the figures that the recipe reports besides its loss."""
    names = {key for line in lines for key in line} - MEASURED
    return sorted(name for name in names if name.removesuffix("_low").removesuffix("_high") not in names - {name})


def _with_interval(lines: list[dict[str, Any]], key: str) -> dict[str, Points]:
    ends = {end: _series(lines, f"{key}_{end}") for end in ("low", "high")}
    return {"score" if ends["low"] else key: _series(lines, key), **ends}


def _commands(folder: Path, config: dict[str, Any], method: type[Run] | None) -> str:
    what = usage.artefact_kind(by_path(folder, artefact(folder)))
    prompt = (config.get("validation_prompt") or ["..."])[0]
    base = str(config.get("model") or "")
    base_class = pipeline_class(base, config.get("revision"), config.get("cache_dir")) if base else ""
    shown = [
        ("Continue the run, or check that it is complete", _resume_command(folder / "config.yaml", method)),
        ("Make images with it", shlex.join(usage.sample(what, str(folder), str(prompt), base_class))),
        ("Publish it on the Hub", shlex.join(["sdtune", "push", str(folder)])),
    ]
    return (
        '<div class="card">'
        + "".join(
            f'<div>{what}</div><div class="command"><pre>{escape(line)}</pre>'
            f'<button type="button" hidden aria-label="Copy: {what}">Copy</button></div>'
            for what, line in shown
        )
        + "</div>"
    )


def _config(config: dict[str, Any], method: type[Run] | None) -> str:
    """Settings that differ from the defaults in bold; the others folded."""
    defaults = {k: f.get_default() for k, f in method.model_fields.items()} if method else {}
    differs = {k: v for k, v in config.items() if k not in defaults or text(defaults[k]) != text(v)}
    same = {k: v for k, v in config.items() if k not in differs}
    folded = table("", same, "") if same else ""
    return table("Settings that differ from the defaults", differs, "There are none.", "set") + (
        f"<details><summary>{len(same)} settings at their defaults</summary>{folded}</details>" if same else ""
    )
