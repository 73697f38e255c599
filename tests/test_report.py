"""report.html: whole, self-contained, escaped, and of bounded size, whatever a run folder holds."""

import json
import re
import subprocess
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from sdtune.config.methods.lora import LoraConfig
from sdtune.run.contact_sheet import grid, save_sheet
from sdtune.run.curves import MOST_POINTS, number, smooth, thin, ticks
from sdtune.run.environment import environment, torchvision_state
from sdtune.run.report import write_report

EVIL = "a \"star\" <script>alert(1)</script> & 'more'"
VOID = {"meta", "wbr", "img", "input", "path", "br", "link"}


class Page(HTMLParser):
    """Text, attributes and nesting of a page; fails on a tag that closes another."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data + "\n"


def sheets(folder, steps, size=64):
    for step in steps:
        small = [Image.effect_noise((size // 8, size // 8), 50).convert("RGB") for _ in range(2)]
        images = [image.resize((size, size)) for image in small]
        save_sheet(grid(images, [EVIL, "a blue circle"]), folder / "samples" / f"step-{step:06d}.png")


def config(folder, **options):
    cfg = LoraConfig(dataset="tiny-hearts", output_dir=folder, **options)
    record = yaml.safe_dump(json.loads(cfg.model_dump_json()), sort_keys=False)
    (folder / "config.yaml").write_text(record, encoding="utf-8")


def metrics(folder, count):
    with (folder / "metrics.jsonl").open("w") as out:
        out.write(json.dumps({"step": 0, "holdout_loss": 0.2}) + "\n")
        for step in range(1, count + 1):
            line = {"step": step, "loss": 1 / step, "learning_rate": 1e-4, "grad_norm": None, "seconds": step}
            out.write(json.dumps(line | {"images_per_second": 4.0, "peak_memory": 2**30, "data_wait": 0.01}) + "\n")


def read(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    urls = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert all(url.startswith("data:image/") for url in urls)
    assert not re.findall(r"https?:|url\(|@import|\bfetch\(", re.sub(r"data:image/[^\"]*", "", html))
    return html, page


def test_a_finished_run(tmp_path):
    folder = tmp_path / "it's a run"
    folder.mkdir()
    config(folder, rank=16, validation_prompt=[EVIL])
    metrics(folder, 30)
    sheets(folder, [0, 10, 20])
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13", "gpu": ["A", "B"]}))
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    html, page = read(folder)
    titles = ["Before and after", "Curves", "Samples over time", "Next steps", "Settings and environment"]
    assert [t for t in page.text.splitlines() if t in titles] == titles
    assert html.count("<script>") == 1  # the page's own
    assert EVIL in page.text
    for text in ("tiny-hearts", "step 20", "1.00", "A\nB", "pytorch_lora_weights.safetensors", "holdout"):
        assert text in page.text
    quoted = "'" + str(folder).replace("'", "'\"'\"'")
    assert f"sdtune lora --config {quoted}/config.yaml'" in page.text
    assert f"sdtune sample --adapter {quoted}' --prompt " in page.text
    assert f"sdtune push {quoted}'" in page.text
    bold = re.findall(r'<tr class="set"><th scope="row">(\w+)', html.replace("<wbr>", ""))
    assert set(bold) == {"output_dir", "validation_prompt", "dataset", "rank"}
    assert page.tags.count("img") == 2 * 2 + 2 * 3
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == page.tags.count("img")
    assert f"before: {EVIL}" in alts


@pytest.mark.parametrize("what", ["nothing", "no lines", "no samples", "one sheet", "torn line"])
def test_a_run_that_has_just_begun(tmp_path, what):
    if what != "nothing":
        config(tmp_path)
    if what in ("one sheet", "torn line"):
        sheets(tmp_path, [0])
        metrics(tmp_path, 1)
    if what == "no lines":
        (tmp_path / "metrics.jsonl").touch()
    if what == "torn line":
        with (tmp_path / "metrics.jsonl").open("a") as out:
            out.write('{"step": 2, "lo')
    _, page = read(tmp_path)
    assert ("No step has been logged yet." in page.text) == (what in ("nothing", "no lines", "no samples"))
    assert ("No samples yet." in page.text) == (what not in ("one sheet", "torn line"))


def test_a_long_run_stays_small(tmp_path):
    config(tmp_path)
    metrics(tmp_path, 20_000)
    sheets(tmp_path, range(0, 8000, 100), size=256)
    html, page = read(tmp_path)
    assert len(html) < 4e6
    assert "60 of 80 sets shown." in page.text
    assert "step 0" in page.text
    assert "step 7900" in page.text


def test_curves():
    assert smooth([(k, 3.0) for k in range(100)]) == [(k, 3.0) for k in range(100)]
    assert smooth([(0, 1.0)]) == [(0, 1.0)]
    assert smooth([(0, 0.0), (1, 3.0), (2, 0.0)])[1] == (1, 1.0)
    points = [(k, 0.0) for k in range(20_000)]
    points[12_345] = (12_345, 9.0)
    assert len(thin(points)) <= MOST_POINTS
    assert (12_345, 9.0) in thin(points)
    assert thin(points) == sorted(thin(points))
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0, 3, whole=True) == [0, 1, 2, 3]
    assert [number(x) for x in (0, 1e-4, 1e-3, 0.05, 12_000)] == ["0", "1e-4", "1e-3", "0.05", "12,000"]


def test_environment_names_versions_and_nothing_private(monkeypatch):
    facts = environment()
    for name in (
        "sdtune",
        "python",
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "platform",
        "gpu",
    ):
        assert facts[name]
    assert json.loads(json.dumps(facts)) == facts
    assert "/" not in "".join(map(str, facts.values())).replace("https://", "")


def test_a_broken_torchvision_is_said_and_tried_once(tmp_path, monkeypatch):
    """To try it takes a Python of its own, and every checkpoint names the versions."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    torchvision_state.cache_clear()
    assert "broken: RuntimeError: operator nms does not exist" in torchvision_state()
    monkeypatch.delattr(subprocess, "run")
    assert "broken: RuntimeError: operator nms does not exist" in environment()["torchvision"]
    torchvision_state.cache_clear()
