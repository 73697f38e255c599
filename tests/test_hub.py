"""Publishing, against the Hub's protocol over HTTP on the loopback, with the real client."""

import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, constants
from PIL import Image

from sdtune import card, hub, publish
from sdtune.sheets import cells
from tests.conftest import command, status
from tests.test_resume import assert_same_bits
from tests.tinyhub import TinyHub

SAMPLES = ("--num-validation-images", "2", "--validation-prompt", "a red circle", "--validation-inference-steps", "3")
PUSHED = {".gitattributes", "README.md", "config.yaml", "metrics.jsonl", "pytorch_lora_weights.safetensors"}


@pytest.fixture
def server():
    with TinyHub() as running:
        yield running


@pytest.fixture
def here(server, monkeypatch):
    """Point this process's client at the server, and make it quick to try again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "connect", lambda: HfApi(endpoint=server.url, token=server.token))
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.05)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", server.token)
    return server


@pytest.fixture
def elsewhere(server, tmp_path):
    """Run a program in a process of its own, as a user would; its exit code and all that it printed."""

    def run(*words, token=server.token, **environment):
        known = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": token}
        known |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [sys.executable, *words], env=os.environ | known | environment, capture_output=True, text=True, timeout=300
        )
        return ended.returncode, ended.stdout + ended.stderr

    return run


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
base, repo, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(repo)
image = pipe("a red circle", num_inference_steps=3, guidance_scale=5.0, width=32, height=32,
             generator=torch.Generator("cpu").manual_seed(0)).images[0]
image.save(out)
"""


def test_stock_diffusers_loads_it_by_name_and_draws_the_same(server, elsewhere, sd, pictures, tmp_path):
    out = tmp_path / "hearts"
    code, said = elsewhere("-m", "sdtune", *command(sd, pictures, out, *SAMPLES, "--push-to-hub"))
    assert code == 0, said
    assert f"pushed: {server.url}/tester/hearts/commit/" in said
    files = server.files("tester/hearts")
    pictured = {f"samples/{name}.png" for name in ("step-000000", "step-000012", "widget-0", "widget-1")}
    assert files.keys() == PUSHED | {"report.html"} | pictured
    code, said = elsewhere("-c", LOAD, str(sd), "tester/hearts", str(tmp_path / "drawn.png"))
    assert code == 0, said
    with Image.open(out / "samples" / "step-000012.png") as sheet, Image.open(tmp_path / "drawn.png") as drawn:
        assert cells(sheet)[0][0].tobytes() == drawn.tobytes()
    absolute = str(tmp_path).encode()
    assert [name for name, content in files.items() if absolute in content and name.endswith((".md", "yaml"))] == []
