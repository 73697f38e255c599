"""metrics.jsonl reads like one uninterrupted run, trackers are checked first, sheets can be read back."""

import json
import math

import pytest
from accelerate import Accelerator
from PIL import Image

from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.run import metrics as module
from sdtune.run.contact_sheet import cells, grid, save_sheet
from sdtune.run.metrics import Metrics, check_trackers, tracker_values
from sdtune.run.metrics_file import cut_off


@pytest.fixture
def cfg(tmp_path):
    return LoraConfig(dataset="d", output_dir=tmp_path / "run", steps=40, train_batch_size=4)


def lines(cfg):
    return [json.loads(line) for line in (cfg.output_dir / "metrics.jsonl").read_text().splitlines()]


def pictures(count, size=(64, 64)):
    return [Image.effect_noise(size, 60 + k).convert("RGB") for k in range(count)]


def test_a_line_has_what_was_given_and_what_is_measured(cfg, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    metrics = Metrics(cfg, Accelerator(cpu=True), 0, 40)
    with metrics.times.part("data_wait"):
        now[0] += 2
    with metrics.times.part("backward"):
        now[0] += 4
    with metrics.paused():
        now[0] += 30
    now[0] += 2
    metrics.log(10, {"loss": 0.5, "learning_rate": 1e-4, "grad_norm": math.inf})
    metrics.log(10, {"holdout_loss": 0.7})
    metrics.close()
    first, second = lines(cfg)
    assert first.pop("peak_memory") > 2**20
    assert first == {
        "step": 10,
        "loss": 0.5,
        "learning_rate": 1e-4,
        "grad_norm": None,
        "images_per_second": 10 * 4 / 8,  # 2 s of waiting and 6 of work; the pause counts for nothing
        "data_wait": 2 / 8,
        "forward": 0.0,
        "backward": 4 / 8,
        "graph": 0.0,
        "optimizer": 0.0,
        "rest": 2 / 8,
        "seconds": 38.0,
    }
    assert second == {"step": 10, "holdout_loss": 0.7, "seconds": 38.0}


def test_an_interrupted_run_is_continued_without_a_seam(cfg):
    cfg.output_dir.mkdir()
    path = cfg.output_dir / "metrics.jsonl"
    written = [json.dumps({"step": s, "loss": 1.0, "seconds": s * 2.0}) for s in (0, 10, 20, 30)]
    path.write_text("\n".join([*written, '{"step": 40, "lo']))
    metrics = Metrics(cfg, Accelerator(cpu=True), 20, 40)
    metrics.log(30, {"loss": 0.5})
    metrics.close()
    assert [line["step"] for line in lines(cfg)] == [0, 10, 20, 30]
    assert lines(cfg)[3]["loss"] == 0.5
    assert lines(cfg)[3]["seconds"] >= 40
    assert cut_off(path, 0) == 0
    assert path.read_text() == ""
    assert sorted(p.name for p in cfg.output_dir.iterdir()) == ["metrics.jsonl", "status.json"]


def test_lines_without_a_terminal_are_few(cfg, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    metrics = Metrics(cfg, Accelerator(cpu=True), 0, 40)
    for step in range(1, 41):
        now[0] += 1
        metrics.advance(step)
        metrics.log(step, {"loss": 1 / step})
    metrics.close()
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "step 10/40  loss 0.1000  4 images/s  0:30 left"
    assert len(printed) == 4


def test_other_processes_do_nothing(cfg):
    class Second:
        is_main_process = False

    metrics = Metrics(cfg, Second(), 0, 40)
    with metrics.times.part("forward"), metrics.paused():
        metrics.advance(1)
        metrics.log(1, {"loss": 1.0})
        metrics.images(1, pictures(1), ["a"])
    metrics.close()
    assert not cfg.output_dir.exists()


def test_trackers_are_checked_before_anything_else():
    check_trackers([])
    check_trackers(["tensorboard", "all"])
    with pytest.raises(UserError, match=r"no such tracker; choose from tensorboard, wandb"):
        check_trackers(["tensorbored"])
    with pytest.raises(UserError, match=r"dvclive is not installed; pip install 'dvclive'"):
        check_trackers(["dvclive"])


def test_tensorboard_gets_numbers_images_and_a_plain_config(cfg):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = cfg.model_copy(update={"report_to": ["tensorboard"]})
    metrics = Metrics(cfg, Accelerator(cpu=True, log_with="tensorboard", project_dir=cfg.output_dir), 0, 40)
    metrics.log(10, {"loss": 0.5})
    metrics.images(10, pictures(2), ["a", "b"])
    metrics.close()
    metrics.close()
    events = EventAccumulator(str(cfg.output_dir / cfg.tracker_project_name))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5)]
    assert [e.step for e in events.Images("samples")] == [10]
    assert tracker_values({"a": cfg.output_dir, "b": ["x", 1], "c": None, "d": 0.5, "e": {"k": 1}}) == {
        "a": str(cfg.output_dir),
        "b": "x, 1",
        "c": "none",
        "d": 0.5,
        "e": "{'k': 1}",
    }


def test_a_sheet_gives_its_images_back(tmp_path):
    images = pictures(5) + pictures(1, (100, 40))
    prompts = ["a red star", "a " * 200, "Ünïcødé 漢字 <b>", "", "x" * 300, "last"]
    sheet = grid(images, prompts)
    save_sheet(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as read:
        found = cells(read)
    assert [text for _, text in found] == prompts
    assert [image.tobytes() for image, _ in found] == [image.tobytes() for image in images]
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(("count", "columns", "width"), [(4, None, 4), (5, None, 3), (5, 2, 2), (1, 9, 1)])
def test_the_shape_of_a_sheet(count, columns, width):
    sheet = grid(pictures(count), columns=columns)
    assert sheet.width == 12 + width * (192 + 12)  # 64 pixels are shown threefold, to be at least 160
    assert sheet.height == 12 + math.ceil(count / width) * (192 + 12)


def test_a_sheet_needs_images_and_their_captions():
    with pytest.raises(ValueError, match="at least one"):
        grid([])
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        grid(pictures(2), ["a"])


def test_images_are_a_sheet_in_the_run_folder(cfg):
    metrics = Metrics(cfg, Accelerator(cpu=True), 0, 40)
    metrics.images(200, pictures(2), ["a", "b"])
    metrics.images(400, [], [])
    metrics.close()
    assert [p.name for p in (cfg.output_dir / "samples").iterdir()] == ["step-000200.png"]


def test_the_last_step_is_printed_once_though_its_holdout_is_logged_as_well(cfg, capsys):
    metrics = Metrics(cfg, Accelerator(cpu=True), 39, 40)
    metrics.log(40, {"loss": 0.5})
    metrics.log(40, {"holdout_loss": 0.7})
    metrics.close()
    assert capsys.readouterr().err.count("step 40/40") == 1
