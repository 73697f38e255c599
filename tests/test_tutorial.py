"""The tutorial is true: each of its commands runs, in its order, on `tiny` and in few steps."""

import shutil

import pytest

from tests.conftest import status
from tests.test_docs import blocks, commands, read
from tools.make_docs import ROOT

BASE = "--model tiny --resolution 64 --mixed-precision no --steps 2 --num-class-images 2 --sample-batch-size 2"
SMALL = {
    "check": BASE,
    "dreambooth": f"{BASE} --num-validation-images 1 --validation-inference-steps 1 --dataloader-num-workers 0",
    "sample": "--model tiny --steps 2 --num-images-per-prompt 1 --width 64 --height 64",
}
"""What is added to a command, so that it takes seconds; later options win."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which the page's relative paths lead somewhere, with photographs for its last section."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdtune").symlink_to(ROOT / "sdtune")
    (tmp_path / "my-dog").mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(ROOT / "sdtune" / "assets" / "tiny-subject" / name, tmp_path / "my-dog")
    return tmp_path


def test_every_command_of_the_tutorial(place, here):
    page = read("docs/tutorial.md")
    ran = []
    for words in commands("\n".join(f"```sh\n{block}```" for block in blocks(page, "sh"))):
        if words[0] == "cp":
            shutil.copytree(*words[2:])
            continue
        assert words[0] == "sdtune"
        assert status([*words[1:], *SMALL.get(words[1], "").split()]) == 0, words
        ran.append(words[1])
    assert {"cp", "check", "dreambooth", "sample", "convert", "inspect", "push"} <= set(ran)
    assert (place / "runs/my-subject/report.html").exists()
    assert (place / "samples/grid.png").exists()
    for source in blocks(page, "python"):
        exec(source.replace("width=64", "num_inference_steps=2, width=64"), {})
