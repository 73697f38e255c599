"""``sdtune compare``: runs beside each other, on one page that opens from disk or as JSON.

What runs do not share is left out of a comparison, so runs of different methods and bases compare in what they have in
common. The page is made from the files in the runs' folders; ``compare.html`` beside this file is its template.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from sdtune import __version__
from sdtune.config.scores import SCORES, score_of, title, which_is_better
from sdtune.config.sections import UserError
from sdtune.config.verbs import CompareConfig
from sdtune.run import settings
from sdtune.run.artefacts import artefact, best
from sdtune.run.curves import Points, chart, clock, number, smooth
from sdtune.run.folder import is_run, sample_sheets, step_of_sheet
from sdtune.run.metrics_file import read_lines
from sdtune.run.page import Encoded, evenly_spaced, label, sheet_cells, text

UNLIKE = frozenset(("output_dir",))
"""Settings that always differ and say nothing."""
MOST_STEPS = 12
"""Sample sheets of a run on the page, evenly spaced."""


class Compared(NamedTuple):
    """A run as it is compared."""

    name: str
    folder: Path
    values: dict[str, Any]
    """Its settings."""
    lines: list[dict[str, Any]]
    """Its metrics."""

    def series(self, key: str) -> Points:
        return [(line["step"], line[key]) for line in self.lines if isinstance(line.get(key), (int, float))]

    def last(self, key: str) -> float | None:
        found = self.series(key)
        return found[-1][1] if found else None

    @property
    def scores(self) -> dict[str, tuple[float, float | None, float | None]]:
        """The last value of each score, with its interval."""
        names = {key for line in self.lines for key in line if score_of(key) and not key.endswith(("_low", "_high"))}
        return {n: (v, self.last(f"{n}_low"), self.last(f"{n}_high")) for n in names if (v := self.last(n)) is not None}

    def facts(self) -> dict[str, Any]:
        """What the run took, and what came out; None where it is not known."""
        files, kept = artefact(self.folder), best(self.folder)
        return {
            "steps": max((line["step"] for line in self.lines), default=0),
            "seconds": self.last("seconds"),
            "peak_memory_bytes": max((m for _, m in self.series("peak_memory")), default=None),
            "artefact_bytes": sum(file.stat().st_size for file in files) or None,
            "best_step": kept[0] if kept else None,
        }


def main(cfg: CompareConfig) -> str:
    """Write the page, or return the JSON.

    Raises:
        UserError: one of the folders is no run.
    """
    runs = read_runs(cfg.runs)
    if cfg.as_json:
        return json.dumps(as_json(runs), indent=2, ensure_ascii=False)
    new = cfg.output.with_name(f".{cfg.output.name}")
    try:
        new.write_text(page(runs), encoding="utf-8")
        new.replace(cfg.output)
    except OSError as error:
        raise UserError(f"--output {cfg.output}: cannot be written ({error.strerror})") from None
    return f"wrote {cfg.output}"


def read_runs(folders: Sequence[Path]) -> list[Compared]:
    runs = []
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("RUNS: a run is given twice; give each once")
    for folder in folders:
        if not is_run(folder):
            raise UserError(f"RUNS {folder}: no run there; give the folders that training wrote (--output-dir)")
        # Folders of one name are told apart by those around them
        name = folder.name if [f.name for f in folders].count(folder.name) == 1 else str(folder)
        found = settings.read(folder)
        values = {"method": found.method} | found.values
        runs.append(Compared(name, folder, values, read_lines(folder / "metrics.jsonl")))
    return runs


def as_json(runs: Sequence[Compared]) -> dict[str, Any]:
    """The comparison for scripts."""
    return {
        "settings": differences(runs),
        "runs": {run.name: run.facts() | {"scores": {n: s[0] for n, s in run.scores.items()}} for run in runs},
        "scores": {name: verdict(runs, name) for name in shared_scores(runs)},
    }


def differences(runs: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """Settings that are not the same in all runs: option to run to value; a run without the option is left out."""
    names = dict.fromkeys(name for run in runs for name in run.values if name not in UNLIKE)
    found = {name: {run.name: run.values[name] for run in runs if name in run.values} for name in names}
    return {
        n: of
        for n, of in found.items()
        if len(of) < len(runs) or any(v != next(iter(of.values())) for v in of.values())
    }


def shared_scores(runs: Sequence[Compared]) -> list[str]:
    """Scores that two runs or more have."""
    names = sorted({name for run in runs for name in run.scores})
    return [name for name in names if sum(name in run.scores for run in runs) > 1]


def verdict(runs: Sequence[Compared], name: str) -> dict[str, Any]:
    """Each run's value and interval of a score, the best run, and whether that is sure.

    It is sure if its 95 % interval overlaps no other; nothing is said of equal values, and of those without intervals.
    """
    have = [run for run in runs if name in run.scores]
    values: dict[str, dict[str, Any]] = {
        run.name: dict(zip(("value", "low", "high"), run.scores[name], strict=True)) for run in have
    }
    better = SCORES[score_of(name) or ""].better
    found: dict[str, Any] = {"values": values, "better": better}
    if better == "neither":
        return found
    if len({value["value"] for value in values.values()}) == 1:
        return found
    found["best"] = chosen = (max if better == "higher" else min)(values, key=lambda run: values[run]["value"])
    others = [value for run, value in values.items() if run != chosen]
    if all(value["low"] is not None for value in values.values()):
        found["sure"] = all(apart(values[chosen], other) for other in others)
    return found


def apart(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether two intervals do not overlap."""
    return a["low"] > b["high"] or b["low"] > a["high"]


# ---- the page ----------------------------------------------------------------------------------------


def page(runs: Sequence[Compared]) -> str:
    style = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        style=style[style.index("<style>") : style.index("</style>") + len("</style>")],
        title=escape(" · ".join(run.name for run in runs)),
        settings=_settings(runs),
        scores=_scores(runs),
        curves=_curves(runs),
        samples=_samples(runs),
        facts=_facts(runs),
        version=escape(__version__),
    )


def _grid(runs: Sequence[Compared], rows: dict[str, list[str]], empty: str) -> str:
    """A table with a column for each run; rows hold HTML."""
    if not rows:
        return f'<p class="none">{empty}</p>'
    heads = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{head}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for head, cells in rows.items()
    )
    table = f'<table class="data compare"><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card scroll" tabindex="0" role="region" aria-label="Comparison">{table}</div>'


def _settings(runs: Sequence[Compared]) -> str:
    rows = {
        label(name): [escape(text(of[run.name])) if run.name in of else "" for run in runs]
        for name, of in differences(runs).items()
    }
    return _grid(runs, rows, "All settings are the same.")


def _scores(runs: Sequence[Compared]) -> str:
    rows = {}
    for name in shared_scores(runs):
        found, better = verdict(runs, name), which_is_better(name)
        cells = []
        for run in runs:
            value = found["values"].get(run.name)
            ends = "" if not value or value["low"] is None else f"{number(_short(value['low']))} to "
            interval = f"<small>{ends}{number(_short(value['high']))}</small>" if value and ends else ""
            mark = ' class="best"' if found.get("best") == run.name else ""
            cells.append(f"<span{mark}>{number(_short(value['value']))}</span> {interval}" if value else "")
        verdicts = {True: "; the best is sure", False: "; the intervals overlap, so it may be chance"}
        sure = verdicts[found["sure"]] if "sure" in found else ""
        rows[f"{escape(title(name))} <small>{better}{sure}</small>"] = cells
    return _grid(runs, rows, "No score was measured in two runs: train with --evaluate-steps or --num-holdout-images.")


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _curves(runs: Sequence[Compared]) -> str:
    """Each figure that two runs share as one chart, with a line for each run."""
    keys = dict.fromkeys(key for run in runs for line in run.lines for key in line)
    skipped = ("step", "seconds", "skipped_steps")
    charts = []
    for key in keys:
        if key in skipped or key.endswith(("_low", "_high")):
            continue
        found = {run.name: run.series(key) for run in runs}
        found = {name: smooth(points) if key == "loss" else points for name, points in found.items() if points}
        if len(found) > 1:
            charts.append(chart(escape(title(key)), which_is_better(key), found, from_zero=False))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else '<p class="none">No curve in two runs.</p>'


def _samples(runs: Sequence[Compared]) -> str:
    """Samples of all runs by prompt; a slider chooses the step, of which each run shows its nearest."""
    sheets = {run.name: _sheets(run) for run in runs}
    prompts = dict.fromkeys(cell.caption for steps in sheets.values() for cells in steps.values() for cell in cells)
    if not prompts:
        return '<p class="none">No samples.</p>'
    rows = {}
    for prompt in prompts:
        row = []
        for run in runs:
            images = [(step, c) for step, cells in sheets[run.name].items() for c in cells if c.caption == prompt]
            row.append("".join(_figure(run, step, image, images[-1][0]) for step, image in images))
        rows[escape(prompt) or "without a prompt"] = row
    steps = sorted({step for of in sheets.values() for step in of})
    slider = (
        f'<label class="scrub" hidden><span>Step</span><input type="range" min="0" max="{len(steps) - 1}" '
        f'value="{len(steps) - 1}" data-steps="{escape(json.dumps(steps))}"><output>{steps[-1]}</output></label>'
    )
    return f"{slider}{_grid(runs, rows, '')}"


def _figure(run: Compared, step: int, image: Encoded, shown: int) -> str:
    """A sample; hidden unless its step is ``shown``."""
    hidden = "" if step == shown else " hidden"
    tag = image.tag(f"{run.name}, step {step}: {image.caption}")
    return f'<figure data-step="{step}"{hidden}>{tag}<figcaption>step {step}</figcaption></figure>'


def _sheets(run: Compared) -> dict[int, tuple[Encoded, ...]]:
    files = evenly_spaced(sample_sheets(run.folder), MOST_STEPS)
    return {step_of_sheet(file): sheet_cells(file) for file in files}


def _facts(runs: Sequence[Compared]) -> str:
    facts = [run.facts() for run in runs]
    shown = {
        "Steps": [f"{f['steps']:,}" for f in facts],
        "Best step": ["" if f["best_step"] is None else f"{f['best_step']:,}" for f in facts],
        "Time": ["" if f["seconds"] is None else clock(f["seconds"]) for f in facts],
        "Peak memory": [_mebibytes(f["peak_memory_bytes"]) for f in facts],
        "Artefact": [_mebibytes(f["artefact_bytes"]) for f in facts],
    }
    return _grid(runs, {name: cells for name, cells in shown.items() if any(cells)}, "Nothing was recorded.")


def _mebibytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f} MiB"
