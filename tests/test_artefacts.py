"""Artefacts of many files: a recipe of one's own leaves a pipeline, whole, recorded, copied, continued, published."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from sdtune.config.sections import RunFailed, UserError
from sdtune.models import pipeline_folder
from sdtune.publish import publish
from sdtune.run import artefacts, folder
from sdtune.run.contact_sheet import cells
from tests.conftest import command, status
from tests.test_usage import ran

FILE = Path(__file__).with_name("own_pipeline.py")
SMALL = ("--steps", "4", "--checkpointing-steps", "2", "--log-steps", "2", "--export-steps", "2", "--use-ema")
PICTURE = ("--num-validation-images", "1", "--validation-prompt", "a red circle", "--validation-inference-steps", "2")
PARTS = {"model_index.json", "notes", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def own(sd, pictures, out, *options):
    return ["run", str(FILE), *command(sd, pictures, out, *SMALL, *PICTURE, *options)[1:]]


@pytest.fixture(autouse=True)
def forget_recipe():
    yield
    sys.modules.pop(FILE.stem, None)


@pytest.fixture(scope="module")
def run(sd, pictures, tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path_factory.mktemp("artefacts") / "whole"
    assert status(own(sd, pictures, out)) == 0
    return out


def content(out, files):
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


def drawn(source):
    pipe = DiffusionPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(0)
    return pipe("a red circle", num_inference_steps=2, guidance_scale=5.0, generator=noise).images[0].tobytes()


def names(file):
    with safe_open(file, framework="pt") as tensors:
        return sorted(tensors.keys())


# ---- a run ---------------------------------------------------------------------------------------------


def test_stock_diffusers_loads_the_run_and_draws_what_it_showed(run):
    files = artefacts.artefact(run, 4)
    assert set(artefacts.entries(run, files)) == PARTS
    assert {path for part in PARTS for path in (run / part, *(run / part).rglob("*")) if path.is_file()} == set(files)
    assert shown(run) == drawn(run)


def test_nothing_of_this_machine_and_names_as_published(run, sd):
    files = artefacts.artefact(run)
    told = [str(run.parent), str(sd), "_name_or_path", "is_local", "local_files_only"]
    assert [file for file in files for text in told if text.encode() in file.read_bytes()] == []
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~pipeline_folder.umask()}
    for part, file in {"text_encoder": "model", "vae": "diffusion_pytorch_model"}.items():
        mine, base = (root / part / f"{file}.safetensors" for root in (run, sd))
        assert names(mine) == names(base)
        assert mine.read_bytes() == base.read_bytes()  # frozen
    assert all(name.startswith("text_model.") for name in names(run / "text_encoder" / "model.safetensors"))
    for table in ("vocab.json", "merges.txt"):  # which transformers 4 reads
        read = json.loads if table.endswith("json") else str
        assert read((run / "tokenizer" / table).read_text()) == read((sd / "tokenizer" / table).read_text())


def test_record_names_the_method(run, sd, pictures, capsys):
    assert (run / "config.yaml").read_text().splitlines()[1] == "method: own"
    assert status(command(sd, pictures, run)) == 2
    assert "method was own, is lora" in capsys.readouterr().err
    assert status(["lora", "--config", str(run / "config.yaml")]) == 2
    assert (
        "config.yaml:2: method: these are the settings of `sdtune own`, not of `sdtune lora`" in capsys.readouterr().err
    )


def test_copies_along_the_way(run):
    copies = {path.name: path for path in (run / "exports").iterdir()}
    assert copies.keys() == {"step-000002", "step-000004"}
    whole = content(run, artefacts.artefact(run))
    last, first = (
        content(copy, [f for f in copy.rglob("*") if f.is_file()]) for _, copy in sorted(copies.items())[::-1]
    )
    assert last == whole
    assert {name for name in first if first[name] != whole[name]} == {"unet/diffusion_pytorch_model.safetensors"}
    assert drawn(copies["step-000002"]) != drawn(run)


def test_figures_of_a_recipe_are_logged_and_shown(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [(line["first_norm"], line["three"]) for line in lines if "loss" in line]
    assert len(figures) == 2
    assert all(norm > 0 and three == 3 for norm, three in figures)
    assert figures[0] != figures[1]
    assert "<figcaption><h3>First norm" in (run / "report.html").read_text()


def test_report_and_card_go_by_the_record(run, capsys):
    assert status(["run", str(FILE), "--config", str(run / "config.yaml")]) == 0
    assert "trained for 4 steps already" in capsys.readouterr().out
    report = (run / "report.html").read_text()
    assert f"wrote {', '.join(sorted(PARTS))}" in report
    assert f"sdtune sample --model {run} --prompt &#x27;a red circle&#x27;" in report
    assert f"sdtune run {FILE} --config" in report


def test_lines_for_use_on_its_card_draw_what_it_showed(run):
    text = (run / "README.md").read_text().replace('circle").images', 'circle", guidance_scale=5.0).images')
    assert ran(text, run)["image"].tobytes() == drawn(run)


def test_continued_run_ends_with_the_same_files(run, sd, pictures, tmp_path):
    out = tmp_path / "cut"
    assert status(own(sd, pictures, out, "--steps", "2")) == 0
    (out / "unet" / "of_an_older_artefact.safetensors").touch()
    assert status(own(sd, pictures, out)) == 0
    assert content(out, artefacts.artefact(out, 4)) == content(run, artefacts.artefact(run, 4))
    assert not (out / "unet" / "of_an_older_artefact.safetensors").exists()
    copies = [[f for f in (root / "exports").rglob("*") if f.is_file()] for root in (out, run)]
    assert content(out, copies[0]) == content(run, copies[1])


def test_the_same_command_writes_what_is_missing(run, sd, pictures, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "again")
    (out / "vae" / "config.json").unlink()
    assert artefacts.artefact(out) == []
    assert status(["push", str(out)]) == 2
    assert "no artefact" in capsys.readouterr().err
    assert status(own(sd, pictures, out)) == 0
    assert content(out, artefacts.artefact(out)) == content(run, artefacts.artefact(run))


def test_overwrite_removes_the_artefact_and_nothing_else(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    theirs = [out / name for name in ("mine.safetensors", "unet/mine.txt", "notes.md")]
    for file in theirs:
        file.write_text("kept")
    folder.discard(out)
    assert sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock") == sorted(theirs)
    assert not (out / "vae").exists()


# ---- on the Hub ----------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
whole, base, adapter, out = sys.argv[1:]
adapted = DiffusionPipeline.from_pretrained(base)
adapted.load_lora_weights(adapter)
for pipe, name in (DiffusionPipeline.from_pretrained(whole), "whole"), (adapted, "adapted"):
    noise = torch.Generator("cpu").manual_seed(0)
    image = pipe("a red circle", num_inference_steps=2, guidance_scale=5.0, width=32, height=32, generator=noise)
    image.images[0].save(f"{out}/{name}.png")
"""


def shown(run):
    """The first image of the last sheet of samples."""
    with Image.open(sorted((run / "samples").glob("step-*.png"))[-1]) as sheet:
        return cells(sheet)[0][0].tobytes()


@pytest.mark.processes
def test_stock_diffusers_loads_what_was_pushed_by_name_and_draws_the_same(here, elsewhere, run, lora, sd, tmp_path):
    """A pipeline, and an adapter that is pushed when its training ends."""
    adapted = lora("hearts", *PICTURE, "--steps", "4", "--push-to-hub")
    assert status(["push", str(run)]) == 0
    files = here.files("tester/whole")
    artefact = content(run, artefacts.artefact(run))
    assert {name: files[name] for name in artefact} == artefact
    samples = {f"samples/{name}.png" for name in ("step-000000", "step-000004", "widget-0")}
    rest = {".gitattributes", "README.md", "config.yaml", "metrics.jsonl", "report.html"}
    assert files.keys() == artefact.keys() | samples | rest
    assert here.titles("tester/whole") == ["sdtune own", "initial commit"]
    private = str(run.parent).encode(), str(FILE.parent).encode()
    assert [name for name, data in files.items() if any(p in data for p in private)] == []
    code, printed = elsewhere("-c", LOAD, "tester/whole", str(sd), "tester/hearts", str(tmp_path))
    assert code == 0, printed
    for name, trained in {"whole": run, "adapted": adapted}.items():
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.tobytes() == shown(trained), name


def test_stages_on_the_way_to_the_hub_never_touch_the_run(here, sd, pictures, tmp_path, monkeypatch):
    out, seen = tmp_path / "staged", []
    checkpoint = publish.Publisher.checkpoint

    def look(self, state):
        checkpoint(self, state)
        seen.append((state.step, artefacts.artefact(out), (out / "model_index.json").exists()))

    monkeypatch.setattr(publish.Publisher, "checkpoint", look)
    assert status(own(sd, pictures, out, "--push-to-hub", "--hub-strategy", "checkpoint")) == 0
    assert seen == [(2, [], False), (4, [], False)]
    assert "sdtune own: step 2" in here.titles("tester/staged") or "sdtune own: step 4" in here.titles("tester/staged")
    artefact, files = content(out, artefacts.artefact(out, 4)), here.files("tester/staged")
    assert {name: files[name] for name in artefact} == artefact
    assert [path for path in out.iterdir() if path.name.startswith((publish.STAGE, ".new"))] == []


# ---- writing -------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(sd):
    return DiffusionPipeline.from_pretrained(sd)


def test_written_anew_leaves_no_stale_file(pipe, tmp_path):
    out = tmp_path / "out"
    first = content(out, pipeline_folder.write_pipeline(out, pipe))
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps(index | {"safety_checker": ["diffusers", "X"]}))
    (out / "safety_checker").mkdir()
    (out / "safety_checker" / "config.json").write_text("{}")
    (out / "unet" / "model-00001-of-00002.safetensors").touch()
    (out / "theirs.txt").write_text("kept")
    again = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert content(out, pipeline_folder.write_pipeline(out, again)) == first
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {*first, "theirs.txt"}


def test_what_does_not_read_back_is_not_kept(pipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = content(out, pipeline_folder.write_pipeline(out, pipe))
    save = type(pipe).save_pretrained

    def then(damage):
        monkeypatch.setattr(type(pipe), "save_pretrained", lambda self, to: (save(self, to), damage(to)))
        with pytest.raises(RuntimeError) as error:
            pipeline_folder.write_pipeline(out, pipe)
        assert content(out, (file for file in out.rglob("*") if file.is_file())) == before
        return str(error.value)

    def lose(to):
        from safetensors.torch import load_file, save_file

        file = to / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors.pop("encoder.conv_in.bias")
        save_file(tensors, file)

    def forget(to):
        index = json.loads((to / "model_index.json").read_text())
        (to / "model_index.json").write_text(json.dumps(index | {"unet": [None, None]}))

    assert "vae: encoder.conv_in.bias is not in it" in then(lose)
    assert "model_index.json: names" in then(forget)

    def change(to):
        with torch.no_grad():
            pipe.unet.conv_in.bias += 1

    assert "conv_in.bias does not read back" in then(change)


def test_kill_while_it_is_put_in_place_leaves_no_pipeline(pipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pipeline_folder.write_pipeline(out, pipe)
    replace = Path.replace

    def killed(self, target):
        if self.name == "unet":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline_folder.write_pipeline(out, pipe)
    assert not (out / "model_index.json").exists()
    assert not (out / artefacts.NEW).exists()


class Writer:
    """A recipe that writes what it is told."""

    def __init__(self, *names, fails=None):
        self.names, self.fails = names, fails

    def eval(self): ...
    def train(self): ...
    def export(self, out):
        if self.fails:
            raise self.fails
        for name in self.names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(name)
        return [out / name for name in self.names]


def test_record_is_of_the_last_whole_artefact(tmp_path):
    wide, narrow = Writer("a", "b/c", "b/d/e"), Writer("a", "b/f")
    artefacts.export_last(wide, tmp_path, 7)
    assert json.loads((tmp_path / "artefact.json").read_text()) == {"step": 7, "files": ["a", "b/c", "b/d/e"]}
    broken = Writer(fails=OSError(28, "No space left on device"))
    with pytest.raises(RunFailed, match=r"No space left on device.*give the same command again"):
        artefacts.export_last(broken, tmp_path, 7)
    assert artefacts.artefact(tmp_path) == []
    artefacts.export_last(narrow, tmp_path, 7)
    assert artefacts.artefact(tmp_path, 7) == [tmp_path / "a", tmp_path / "b" / "f"]
    assert artefacts.artefact(tmp_path, 8) == []
    assert not (tmp_path / "b" / "c").exists() and not (tmp_path / "b" / "d").exists()


def test_failed_copy_leaves_nothing(tmp_path):
    broken = Writer(fails=OSError(28, "No space left on device"))
    with pytest.raises(RunFailed, match="step-000007"):
        artefacts.export_copy(broken, tmp_path, 7)
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"files": []}', "damaged"),
        ('{"step": 1, "files": ["../secret"]}', "../secret is no file of this run"),
        ('{"step": 1, "files": ["/etc/passwd"]}', "/etc/passwd is no file of this run"),
    ],
)
def test_record_that_is_none(record, told, tmp_path, capfd):
    (tmp_path / "artefact.json").write_text(record)
    (tmp_path / "config.yaml").write_text("method: lora\ndataset: d\n")
    with pytest.raises(UserError, match=re.escape(told)):
        folder.discard(tmp_path)
    assert status(["push", str(tmp_path)]) == 2
    assert told in capfd.readouterr().err


def test_run_of_a_time_without_a_record(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert artefacts.artefact(tmp_path) == []  # no run at all
    (tmp_path / "config.yaml").write_text("dataset: d\n")
    assert artefacts.artefact(tmp_path) == [tmp_path / "pytorch_lora_weights.safetensors"]
    (tmp_path / "config.yaml").write_text("method: lora\ndataset: d\n")
    assert artefacts.artefact(tmp_path) == []  # it has not ended
