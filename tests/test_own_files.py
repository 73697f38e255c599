"""What sdtune did not write itself it neither counts, prunes nor continues from; what it wrote is never its input."""

import os
import shutil
from io import BytesIO

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdtune.config.methods.dreambooth import DreamBoothConfig
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.models.pixel_models import read_classes
from sdtune.recipes import class_images
from sdtune.run import artefacts, checkpoints, folder
from sdtune.run.contact_sheet import cells, grid, save_sheet
from sdtune.run.report import write_report


def save(root, step, keep=2):
    return checkpoints.save(root, step, {"weights": {"w": torch.zeros(2)}}, {"step": step}, keep)


@pytest.mark.fault(
    "A checkpoint was copied or renamed by hand", "It is neither counted, nor removed, nor continued from."
)
@pytest.mark.parametrize("name", ["step-000004 (copy)", "step-000004-good", "step-000004.bak", "step-4-best"])
def test_copies_of_checkpoints_are_neither_removed_nor_continued_from(name, tmp_path):
    copy = tmp_path / name
    shutil.copytree(save(tmp_path, 4), copy)
    for step in (8, 12, 16):
        save(tmp_path, step)
    assert [c.name for c in checkpoints.found(tmp_path)] == ["step-000012", "step-000016"]
    assert copy.is_dir()
    shutil.rmtree(tmp_path / "step-000012")
    shutil.rmtree(tmp_path / "step-000016")
    assert checkpoints.latest(tmp_path, print) is None


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, step)
    assert [c.name for c in checkpoints.found(tmp_path)] == ["step-1000000", "step-1000001"]
    latest = checkpoints.latest(tmp_path, print)
    assert latest is not None and latest.name == "step-1000001"


def test_a_hidden_folder_of_the_user_among_the_checkpoints_stays(tmp_path):
    for name in (".new-plan", ".old-runs", ".new-000004-77", ".old-step-000004"):
        (tmp_path / name).mkdir()
    checkpoints.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".new-plan", ".old-runs"]


def begun(out):
    out.mkdir(exist_ok=True)
    (out / ".lock").touch()
    folder.begin(LoraConfig(dataset="d", output_dir=out), ["lora"], False, False)
    return out


def test_overwrite_removes_only_what_the_run_wrote(tmp_path):
    out = begun(tmp_path / "run")
    save(out / "checkpoints", 4)
    shutil.copytree(out / "checkpoints" / "step-000004", out / "checkpoints" / "step-000004-good")
    (out / "samples").mkdir()
    (out / "samples" / "step-000004.png").write_bytes(b"")
    (out / "samples" / "step-000004 (copy).png").write_bytes(b"")
    (out / "exports" / "step-000004").mkdir(parents=True)
    folder.discard(out)
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if "step-000004-good/" not in p.as_posix())
    assert left == [".lock", "checkpoints", "checkpoints/step-000004-good", "samples", "samples/step-000004 (copy).png"]


@pytest.mark.fault("The output folder holds files of your own under the names of a run's", "Refused; they stay.")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["config.yaml", "README.md", "model_index.json"])
def test_files_of_the_user_are_not_replaced(name, overwrite, tmp_path):
    (tmp_path / name).write_text("steps: 3  # mine\n")
    cfg = LoraConfig(dataset="d", output_dir=tmp_path)
    with pytest.raises(UserError, match=f"--output-dir .*: {name} there was not written by a run"):
        folder.begin(cfg, ["lora"], overwrite, False)
    assert (tmp_path / name).read_text() == "steps: 3  # mine\n"
    (tmp_path / name).unlink()
    folder.begin(cfg, ["lora"], overwrite, False)
    (tmp_path / "README.md").write_text("")  # a run that stopped before its first step left it
    folder.begin(cfg, ["lora"], overwrite, False)


def test_a_renamed_sample_sheet_does_not_break_the_report(tmp_path):
    out = begun(tmp_path / "run")
    for name in ("step-000000", "step-000004", "step-000004 (copy)", "step-best"):
        save_sheet(grid([Image.new("RGB", (8, 8))], ["a"]), out / "samples" / f"{name}.png")
    write_report(out)
    assert [folder.step_of_sheet(s) for s in folder.sample_sheets(out)] == [0, 4]
    assert len(cells(Image.open(out / "samples" / "step-best.png"))) == 1


@pytest.mark.fault("A killed run left half-written files", "The next run removes them, and no file of yours.")
def test_half_written_files_of_killed_runs_are_swept(tmp_path):
    out = begun(tmp_path / "run")
    strays = [".config-77.yaml", ".launch-77.yaml", ".tmpAb12Cd", "metrics.jsonl.partial", "report.html.partial"]
    for name in [*strays, "tmp-notes.tmp"]:
        (out / name).write_text("half")
        os.utime(out / name, (0, 0))
    (out / ".config-78.yaml").write_text("another process writes this now")
    begun(out)
    assert not [name for name in strays if (out / name).exists()]
    assert (out / "tmp-notes.tmp").exists() and (out / ".config-78.yaml").exists()


def test_the_folder_of_a_run_is_recognised(tmp_path):
    out = begun(tmp_path / "run")
    assert folder.is_run(out)
    assert {"samples", "exports", "class-pictures", "checkpoints"} <= folder.own_entries(out)
    (tmp_path / "config.yaml").write_text("method: lora\n")
    assert not folder.is_run(tmp_path) and not folder.own_entries(tmp_path)


@pytest.mark.fault("`config.yaml` of the run is damaged", "Refused in one line; `--overwrite` starts anew.")
@pytest.mark.parametrize("damaged", ["a: [1", "- 1\n- 2\n", "\x00", "\udcff"])
def test_a_damaged_config_of_an_earlier_run_is_one_line(damaged, tmp_path):
    out = begun(tmp_path / "run")
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "config.yaml").write_bytes(damaged.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.yaml.*--overwrite") as caught:
        folder.begin(LoraConfig(dataset="d", output_dir=out), ["lora"], False, False)
    assert "\n" not in str(caught.value)
    folder.begin(LoraConfig(dataset="d", output_dir=out), ["lora"], True, False)


NESTED = "[" * 100_000


@pytest.mark.fault("A record in a run's folder holds anything", "It is passed over, or refused in one line.")
def test_records_that_are_nested_without_end_are_damaged(tmp_path):
    out = begun(tmp_path / "run")
    (out / "metrics.jsonl").write_text(f"{NESTED}\n")
    info = PngInfo()
    info.add_text("sdtune", NESTED)
    (out / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(out / "samples" / "step-000004.png", pnginfo=info)
    write_report(out)
    (save(out / "checkpoints", 4) / checkpoints.MANIFEST).write_text(NESTED)
    assert checkpoints.verify(out / "checkpoints" / "step-000004") == "manifest.json is damaged"
    (out / artefacts.ARTEFACT).write_text(NESTED)
    with pytest.raises(UserError, match=r"artefact\.json: damaged"):
        artefacts.artefact(out)
    (tmp_path / "classes.json").write_text(NESTED)
    with pytest.raises(UserError, match=r"classes\.json: maximum recursion"):
        read_classes(str(tmp_path), "--model x")


@pytest.mark.fault("A folder inside the run's cannot be written", "Refused before the model loads.")
@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_a_folder_that_cannot_be_written_is_found_before_training(name, tmp_path, monkeypatch):
    out = begun(tmp_path / "run")
    (out / name).mkdir()

    def forbidden(*_, dir, **__):
        if str(dir).endswith(name):
            raise PermissionError(13, "Permission denied")
        return BytesIO()

    with monkeypatch.context() as patch:
        patch.setattr(folder.tempfile, "TemporaryFile", forbidden)
        with pytest.raises(UserError, match=f"{name}: cannot be written"):
            folder.make_folders(out)
    (out / name).rmdir()
    (out / name).write_text("in the way")
    with pytest.raises(UserError, match=f"{name}: cannot be written"):
        folder.make_folders(out)


@pytest.mark.fault("A class image is damaged", "In the run's own folder it is made again; in yours it is named.")
def test_junk_among_the_class_images_is_one_line_or_made_again(tmp_path):
    fields = {"dataset": "d", "prior_preservation": True, "class_prompt": ["a circle"], "num_class_images": 2}
    own, others = tmp_path / "own", tmp_path / "others"
    for place in (own, others):
        place.mkdir()
        (place / "made-00000.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
        Image.new("RGB", (8, 8)).save(place / "made-00001 (copy).png")
    cfg = DreamBoothConfig(**fields, output_dir=tmp_path)
    class_images.prepare_folder(cfg, own, [], 2)
    assert [p.name for p in own.iterdir()] == ["made-00001 (copy).png"]
    with pytest.raises(UserError, match=r"made-00000\.png was made with other settings \(no readable image\)"):
        class_images.prepare_folder(cfg.model_copy(update={"class_data": others}), others, [], 2)
    assert len(list(others.iterdir())) == 2
