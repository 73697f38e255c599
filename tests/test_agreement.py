"""Runs that are scored by whether their images agree with those that they follow, or edit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from sdtune.config.methods.instruct_pix2pix import InstructPix2PixConfig
from sdtune.data import Stream, load_images
from sdtune.data.conditions import edges
from sdtune.data.further import to_image
from sdtune.evaluation.agreement import edge_overlap
from sdtune.run import artefacts, checkpoints
from tests import contract, ranks
from tests.conftest import status
from tests.test_scoring import scored
from tests.tinyclip import save_tiny_clip

SCORED = (
    *("--evaluate-steps", "2", "--num-evaluation-images", "4", "--validation-inference-steps", "2", "--steps", "4"),
    *("--train-batch-size", "2", "--checkpointing-steps", "3", "--learning-rate", "0.05"),
    *("--num-validation-images", "0"),
)
EDGES = (*SCORED, "--num-holdout-images", "3", "--keep-best", "edge_overlap")
EDITED = (("a", "a a"), ("a a", "a"), ("a", "a a a"), ("a a a", "a"))
"""Captions before and after: the tiny CLIP knows this word."""
COLUMNS = ("--original-caption-column", "before", "--edited-caption-column", "after")


@pytest.fixture(scope="session")
def clip(once) -> Path:
    return once("clip-of-words", save_tiny_clip)


@pytest.fixture(scope="session")
def pairs(once) -> Path:
    """Four edits with captions before and after, and edges as conditioning images."""

    def write(folder: Path) -> None:
        for name in ("input_image", "conditioning_image"):
            (folder / name).mkdir(parents=True)
        rows = []
        for k, (before, after) in enumerate(EDITED):
            pixels = np.random.default_rng(k).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
            names = f"{k}.png", f"input_image/{k}.png", f"conditioning_image/{k}.png"
            condition = to_image(edges(torch_of(pixels[0])))
            for name, image in zip(names, (*map(Image.fromarray, pixels), condition), strict=True):
                image.save(folder / name)
            row = {"file_name": names[0], "input_image_file_name": names[1], "conditioning_image_file_name": names[2]}
            rows.append(row | {"edit_prompt": f"a circle {k}", "before": before, "after": after})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return once("edited-pairs", write)


def torch_of(pixels: np.ndarray):
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def agreement_of(samples: Path, reference: Path, out: Path, *words: str) -> dict:
    """What `sdtune evaluate` says of a folder that `sdtune sample` filled."""
    few = ["--neighbours", "1", "--resamples", "0", "--output-dir", str(out)]
    assert status(["evaluate", str(samples), "--reference", str(reference), *few, *words]) == 0
    figures = json.loads((out / "evaluation.json").read_text())["figures"]
    return {name: of["value"] for name, of in figures.items()}


@pytest.fixture
def run(shared) -> Path:
    return shared("controlnet", *EDGES)


def test_agreement_with_held_out_edges_is_scored_reported_and_kept(run, tmp_path, capsys):
    figures = scored(run)
    assert list(figures) == [0, 2, 4]
    values = {step: of["edge_overlap"] for step, of in figures.items()}
    assert all(0 <= of["edge_overlap_low"] <= of["edge_overlap"] <= of["edge_overlap_high"] for of in figures.values())
    assert len(set(values.values())) == 3
    assert artefacts.best(run)[0] == max(values, key=values.get)
    assert "Overlap of edges" in (run / "report.html").read_text()
    card = (run / "README.md").read_text()
    assert "edge_overlap" in card
    other = shutil.copytree(run, tmp_path / "other")
    assert status(["compare", str(run), str(other), "--json"]) == 0
    assert "edge_overlap" in capsys.readouterr().out


@pytest.mark.processes
def test_a_killed_run_has_the_same_agreement_and_best(run, places, tmp_path):
    out = tmp_path / "run"
    words = contract.command("controlnet", places, out, *EDGES)
    ranks.interrupt(words, tmp_path / "output", 9, lambda: 4 in scored(out))
    assert checkpoints.found(out / "checkpoints")[-1].name == "step-000003"
    assert status(words) == 0
    assert scored(out) == scored(run) and artefacts.best(out)[0] == artefacts.best(run)[0]


@pytest.mark.processes
def test_two_processes_score_agreement_as_one(run, shared):
    both, one = scored(shared("controlnet", *EDGES, "--train-batch-size", "1", world=2)), scored(run)
    for step, of in one.items():
        assert both[step] == pytest.approx(of, abs=0.02)


def test_evaluate_gives_the_figure_of_the_run_for_edges_of_a_column(pairs, sd, trained, tmp_path, capsys):
    """Of images given with --validation-image, drawn again by `sdtune sample`."""
    files = [str(pairs / "conditioning_image" / f"{k}.png") for k in range(2)]
    prompts = ["a red circle", "a blue square"]
    words = ["--dataset", str(pairs), "--caption-column", "edit_prompt", "--evaluate-condition", "edges"]
    words += ["--validation-image", *files, "--validation-prompt", *prompts]
    command = contract.command("t2i-adapter", contract.Places(sd, pairs, pairs), tmp_path / "run", *SCORED, *words)
    at = command.index("--condition")  # which would make edges of the pictures
    assert status([*command[:at], *command[at + 2 :]]) == 0
    plan = capsys.readouterr().out
    assert "scores: 3 times 4 images, 48 passes of the denoiser" in plan and "agreement with 2 images: edges" in plan
    lines = "".join(f"{prompts[k % 2]} --cn {files[k % 2]} --d {k}\n" for k in range(4))
    (tmp_path / "prompts.txt").write_text(lines)
    sample = ["sample", "--control", str(tmp_path / "run"), "--prompt-file", str(tmp_path / "prompts.txt")]
    assert status([*sample, "--steps", "2", "--output-dir", str(tmp_path / "drawn")]) == 0
    again = agreement_of(tmp_path / "drawn", pairs, tmp_path / "evaluated", "--condition", "edges")
    assert scored(tmp_path / "run")[4]["edge_overlap"] == pytest.approx(again["edge_overlap"], abs=1e-6)


def test_evaluate_gives_the_figure_of_the_run_for_edits(pairs, sd, clip, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--dataset", str(pairs), "--image-column", "image", "--caption-column", "edit_prompt", *COLUMNS]
    words += ["--clip-model", str(clip), "--keep-best", "edit_direction", "--num-holdout-images", "2"]
    command = contract.command("instruct-pix2pix", contract.Places(sd, pairs, pairs), out, *SCORED, *words)
    assert status(command) == 0
    plan = capsys.readouterr().out
    assert "72 passes of the denoiser" in plan and "agreement with 2 images: edit" in plan
    figures = scored(out)
    values = {step: of["edit_direction"] for step, of in figures.items()}
    assert all(values.values()) and artefacts.best(out)[0] == max(values, key=values.get)
    assert all(-1 <= of["edit_direction_low"] <= of["edit_direction_high"] <= 1 for of in figures.values())
    cfg = InstructPix2PixConfig(
        dataset=str(pairs), resolution=32, num_holdout_images=2, caption_column="edit_prompt", image_column="image"
    )
    held = Stream(cfg, load_images(cfg), 2).holdout
    lines = []
    for k in range(4):
        number = int(Path(held[k % 2].name).stem)
        before, after = EDITED[number]
        file = pairs / "input_image" / f"{number}.png"
        lines.append(f"a circle {number} --cn {file} --d {k} --before {before} --after {after}\n")
    (tmp_path / "prompts.txt").write_text("".join(lines))
    sample = ["sample", "--model", str(out), "--prompt-file", str(tmp_path / "prompts.txt"), "--steps", "2"]
    assert status([*sample, "--image-guidance-scale", "1.5", "--output-dir", str(tmp_path / "drawn")]) == 0
    asked = ["--condition", "edit", "--clip-model", str(clip)]
    again = agreement_of(tmp_path / "drawn", pairs, tmp_path / "evaluated", *asked)
    assert figures[4]["edit_direction"] == pytest.approx(again["edit_direction"], abs=1e-5)


def test_captions_of_edits_in_a_table(pairs, tmp_path):
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    images = {"edited_image": "file_name", "input_image": "input_image_file_name"}
    texts = ("edit_prompt", "before", "after")
    columns = {name: [str(pairs / row[key]) for row in rows] for name, key in images.items()}
    columns |= {name: [row[name] for row in rows] for name in texts}
    features = Features(dict.fromkeys(images, ImageFeature()) | dict.fromkeys(texts, Value("string")))
    Dataset.from_dict(columns, features).save_to_disk(tmp_path / "table")
    options = {"original_caption_column": "before", "edited_caption_column": "after", "resolution": 32}
    cfg = InstructPix2PixConfig(dataset=str(tmp_path / "table"), evaluate_steps=1, clip_model="x", **options)
    found = load_images(cfg)  # the instruction is the only other column
    assert [row.edit for row in found.rows] == list(EDITED) and found.rows[0].captions == ("a circle 0",)
    plain = load_images(cfg.model_copy(update={"original_caption_column": None, "edited_caption_column": None}), False)
    assert plain.rows[0].edit is None


def test_overlap_does_not_depend_on_who_asks():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:12, 4:12] = 255
    image = Image.fromarray(pixels)
    drawn = to_image(edges(torch_of(pixels)))
    assert edge_overlap(image, drawn) == 1
    assert edge_overlap(image, drawn.resize((64, 64), Image.Resampling.NEAREST)) == 1
    assert edge_overlap(image, Image.new("L", (16, 16))) == 0
    assert edge_overlap(Image.new("RGB", (16, 16)), Image.new("L", (16, 16))) == 1


RED = ("--validation-prompt", "make it red")
REFUSED = [
    ("lora", ["--keep-best", "edge_overlap"], "keep_best edge_overlap: only where images follow edges"),
    ("lora", ["--keep-best", "edit_direction"], "keep_best edit_direction: only where CLIP judges edits"),
    ("controlnet", ["--keep-best", "edge_overlap", "--condition", "blur"], "only where images follow edges"),
    ("controlnet", ["--evaluate-condition", "edges", "--condition", "grey"], "condition makes grey instead"),
    ("controlnet", ["--evaluate-condition", "edges", "--evaluate-steps", "0"], "--evaluate-steps"),
    ("instruct-pix2pix", ["--keep-best", "edit_direction"], "only where CLIP judges edits"),
    ("instruct-pix2pix", [*COLUMNS], "--clip-model"),
    ("instruct-pix2pix", [*COLUMNS[:2], "--clip-model", "x"], "give two columns, or neither"),
    ("instruct-pix2pix", [*COLUMNS, "--clip-model", "{clip}"], "--original-caption-column before: no such column"),
    (
        "instruct-pix2pix",
        [COLUMNS[0], "text", COLUMNS[2], "input_image_file_name", *("--clip-model", "{clip}", "--caption", "x"), *RED],
        "--num-holdout-images",
    ),
]


def test_agreement_that_cannot_be_measured_is_one_line(places, clip, tmp_path, capsys):
    for number, (method, options, told) in enumerate(REFUSED):
        words = [word.format(clip=clip) for word in options]
        out = tmp_path / str(number)
        assert status(contract.command(method, places, out, *SCORED, *words)) == 2, options
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1, said
        assert not (out / "metrics.jsonl").exists()
