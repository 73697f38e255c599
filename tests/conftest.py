"""What the tests share: a tiny pipeline, a folder of pictures, and the command line itself."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import HfApi, constants
from hypothesis import HealthCheck, settings
from PIL import Image

from sdtune.cli import main
from sdtune.publish import hub
from tests import contract, quick_sdtune, ranks
from tests.tinyhub import TinyHub
from tests.tinysd import save_tiny_sd
from tests.tinyunclip import save_tiny_clip, save_tiny_decoder, save_tiny_prior

torch.set_num_threads(1)

FUZZ = {"deadline": None, "database": None}
FUZZ |= {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("short", max_examples=15, derandomize=True, **FUZZ)
settings.register_profile("long", max_examples=1000, **FUZZ)


def pytest_configure(config):
    """The fuzzers try a few examples, always the same; ``-m fuzz`` tries a thousand new ones."""
    settings.load_profile("long" if config.option.markexpr == "fuzz" else "short")


def pytest_collection_finish():
    """What imports have made stays: garbage is not looked for among it."""
    gc.freeze()


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: a seventh of the time a test waits, for a process, a lock or a server."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of the session's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SDTUNE_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one precision for the life of a process; each test is a run of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make a file or folder of a name by a function, once a session, whichever worker asks first; where it lies.

    Workers then name the same paths, and may go on with each other's runs.
    """
    base = tmp_path_factory.getbasetemp()
    common = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    common.mkdir(exist_ok=True)

    def make(name: str, write: Callable[[Path], object]) -> Path:
        out = common / name
        done = common / f"{name}.done"
        with ranks.locked(common / f"{name}.lock"):
            if not done.exists():
                write(out)
                done.touch()
        return out

    return make


@pytest.fixture(scope="session")
def sd(once) -> Path:
    """A Stable Diffusion pipeline of 256 k random parameters in a folder; 32 x 32 images, 16 x 16 latents."""
    return once("tiny-sd", save_tiny_sd)


@pytest.fixture(scope="session")
def pictures(once) -> Path:
    """Eleven captioned pictures, the last ones wider; each is its own input image, for methods that need one."""

    def write(folder: Path) -> None:
        folder.mkdir()
        numbers = np.random.default_rng(0)
        with (folder / "metadata.jsonl").open("w") as lines:
            for i in range(11):
                pixels = numbers.integers(0, 256, (40, 40 + max(0, i - 5), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
                row = {"file_name": f"{i:02d}.png", "input_image_file_name": f"{i:02d}.png"}
                lines.write(json.dumps(row | {"text": f"a red circle {i}"}) + "\n")

    return once("pictures", write)


@pytest.fixture(scope="session")
def pixels(once) -> Path:
    """A model of RGB pixels, 16 a side, with random weights, that predicts velocity."""

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        unet = UNet2DModel(16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
        DDPMPipeline(unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(folder)

    return once("pixels", write)


@pytest.fixture(scope="session")
def clip(once) -> Path:
    """A CLIP of transformers that sees 16 x 16 pixels, with random weights."""
    return once("tiny-clip", save_tiny_clip)


@pytest.fixture(scope="session")
def prior(once, clip) -> Path:
    """A pipeline of Kandinsky 2.2's prior on that CLIP, with random weights."""
    return once("tiny-prior", lambda folder: save_tiny_prior(folder, clip))


@pytest.fixture(scope="session")
def decoder(once) -> Path:
    """A pipeline of Kandinsky 2.2's decoder, with random weights; 32 x 32 pictures, 16 x 16 latents."""
    return once("tiny-decoder", save_tiny_decoder)


@pytest.fixture(scope="session")
def places(sd, pictures, pixels, clip, prior, decoder) -> contract.Places:
    return contract.Places(sd, pictures, pixels, clip, prior, decoder)


@pytest.fixture
def server():
    with TinyHub() as running:
        yield running


@pytest.fixture
def here(server, monkeypatch):
    """A Hub of the test's own: this process's client speaks to it, and is quick to try again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "connect", lambda: HfApi(endpoint=server.url, token=server.token))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own second between two tries
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


@pytest.fixture
def python() -> Iterator[Path]:
    """Stands in for Python where something starts `python -m sdtune`; only what it starts is a fork."""
    with quick_sdtune.executable() as file:
        yield file


LONG = ["--steps", "20", "--checkpointing-steps", "5", "--log-steps", "1", "--train-batch-size", "1"]
"""Options of a run that is long enough to be interrupted."""


@pytest.fixture(scope="session")
def shared(places, once) -> Callable[..., Path]:
    """The folder of a finished run, to be read alone: made once a session, by whichever worker asks first.

    Arguments are the recipe and its options; ``world`` processes make it.
    """

    def run(recipe: str, *options: str, world: int = 1) -> Path:
        name = hashlib.sha256(repr((recipe, options, world)).encode()).hexdigest()[:16]

        def train(out: Path) -> None:
            words = contract.command(recipe, places, out, *options)
            if world > 1:
                ranks.train(world, words, out.with_suffix(".output"))
                return
            with out.with_suffix(".log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
                assert status(words) == 0, out.with_suffix(".log").read_text()
            AcceleratorState._reset_state(reset_partial_state=True)

        return once(name, train)

    return run


@pytest.fixture
def copied(shared, tmp_path) -> Callable[..., Path]:
    """A copy of a shared run in ``tmp_path / name``, to be continued or damaged; the run's folder."""

    def copy(recipe: str, name: str, *options: str) -> Path:
        return shutil.copytree(shared(recipe, *options), tmp_path / name)

    return copy


@pytest.fixture
def uninterrupted(shared) -> Path:
    """A long run on two processes, which nothing interrupted."""
    return shared("lora", *LONG, world=2)


@pytest.fixture
def trained(places, tmp_path):
    """Run a recipe in small, with more options, into ``tmp_path / name``; the run's folder."""

    def run(recipe: str, name: str, *options: str) -> Path:
        out = tmp_path / name
        assert status(contract.command(recipe, places, out, *options)) == 0
        return out

    return run


@pytest.fixture
def lora(sd, pictures, tmp_path):
    """Run ``sdtune lora`` with small settings and more options, into ``tmp_path / name``; the run's folder."""

    def run(name: str, *options: str) -> Path:
        out = tmp_path / name
        assert status(command(sd, pictures, out, *options)) == 0
        return out

    return run


def command(sd: Path, pictures: Path, out: Path, *options: str) -> list[str]:
    """``sdtune lora`` on the tiny pipeline; later options win over these."""
    return contract.command("lora", contract.Places(sd, pictures, Path()), out, *options)


def status(words: list[str]) -> int:
    """Exit code of a command line run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code
