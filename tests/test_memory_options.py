"""Gradient checkpointing and compilation reach the parts that can do it, and leave the others alone."""

import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sdtune.cli import main
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.models.memory_options import checkpoint_gradients, compile_blocks
from sdtune.models.noisy_classifier import NoisyClassifier
from sdtune.recipes.lora import Lora
from sdtune.run import processes
from sdtune.run.device import is_out_of_memory
from sdtune.training import batch_size, engine, memory_estimate
from sdtune.training.preview_memory import size_of
from tests import contract, ranks, tars
from tests.conftest import status
from tests.contract import RECIPES
from tests.test_gpu_ready import settings


@pytest.mark.parametrize("recipe", ["textual-inversion", "dreambooth, adapters and a word"])
def test_gradient_checkpointing_with_a_new_token_changes_nothing_but_memory(recipe, shared, trained):
    """The vectors of a new token are a part of these recipes, and have no blocks."""
    one = shared(recipe, "--steps", "2")
    other = trained(recipe, "other", "--steps", "2", "--gradient-checkpointing")
    kept, recomputed = (RECIPES[recipe].artefact(run) for run in (one, other))
    for name, tensor in kept.items():
        assert torch.allclose(recomputed[name], tensor, atol=1e-5), name


def test_gradient_checkpointing_that_no_part_can_do_is_refused():
    with pytest.raises(UserError, match="--gradient-checkpointing: no part of this method can do it"):
        checkpoint_gradients([nn.Linear(1, 1)])


def test_a_model_is_compiled_by_its_repeated_blocks_or_as_a_whole():
    """diffusers refuses to compile the blocks of a network of pixels, since it names none; a classifier has no name."""
    unet = UNet2DModel(
        16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    classifier = NoisyClassifier(16, 3, 2, (8, 16), ("DownBlock2D",) * 2, 1, 8, 4)
    token = nn.Linear(1, 1)
    compile_blocks([unet, classifier, token])
    blocks = [block for block in unet.modules() if isinstance(block, ResnetBlock2D)]
    assert len(blocks) > 4 and all(block._compiled_call_impl is not None for block in blocks)
    assert unet._compiled_call_impl is None
    assert classifier._compiled_call_impl is not None
    assert token._compiled_call_impl is None


def test_the_largest_batch_for_several_processes_is_searched_in_a_fork(monkeypatch):
    """What the search leaves on a GPU goes with its process; one process trains where it has searched."""
    monkeypatch.setattr(batch_size, "largest_cut", lambda *given: {"train_batch_size": os.getpid()})
    cfg = LoraConfig(dataset="d")
    assert batch_size.largest_batch(Lora, cfg, 1, None).train_batch_size == os.getpid()
    assert batch_size.largest_batch(Lora, cfg, 2, None).train_batch_size != os.getpid()


def test_previews_decode_one_image_at_a_time_and_are_in_the_estimate(places, tmp_path, monkeypatch):
    cfg = settings(contract.command("lora", places, tmp_path / "run", "--num-validation-images", "1"))
    decoded = []

    def generate(pipe, *given, **options):
        decoded.append(pipe.vae.use_slicing)
        return []

    monkeypatch.setattr("sdtune.recipes.finetune.generate", generate)
    Lora(cfg, torch.device("cpu")).sample(["a"], [0])
    assert decoded == [True]
    monkeypatch.setattr(memory_estimate, "traced", lambda *step: Counter())  # half a second, of which this is no part
    counted, of_preview = [], memory_estimate.of_preview
    monkeypatch.setattr(memory_estimate, "of_preview", lambda *given: counted.append(given) or 10**9)
    made = memory_estimate.meta_recipe(Lora, cfg, 2, lambda line: None)
    assert memory_estimate.estimate(*made, torch.device("cpu"), base=0).total > 10**9
    recipe, parts, device = counted[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert of_preview(recipe, parts, device) > size_of([x for part in parts.values() for x in part.parameters()])


def test_a_run_out_of_memory_names_the_options_that_save_enough(places, tmp_path, monkeypatch, capsys):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert is_out_of_memory(full)
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried")

    passes = []

    def backward(self, loss, made=engine.Engine.backward):
        passes.append(loss)
        if len(passes) == 1:  # the others are those of the estimates, which take no memory
            raise full
        made(self, loss)

    monkeypatch.setattr(engine.Engine, "backward", backward)
    monkeypatch.setattr(batch_size, "savings", lambda cfg: iter([{"gradient_checkpointing": True}]))
    words = contract.command("lora", places, tmp_path / "run", "--train-batch-size", "2")
    assert status([*words, "--dataloader-num-workers", "1"]) == 1
    assert not multiprocessing.active_children()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 1
    assert "out of memory" in lines[0] and "it needs less with --" in lines[0]


def test_another_error_of_torch_stays_what_it_is(places, tmp_path, monkeypatch):
    def broken(self, loss):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine.Engine, "backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(contract.command("lora", places, tmp_path / "run"))


FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried")


def failed(capsys, words):
    assert status(words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    return line


def test_other_commands_that_are_out_of_memory_name_what_needs_less(places, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise FULL

    monkeypatch.setattr("sdtune.sampling.sample.generate", full)
    out = ["--output-dir", str(tmp_path / "out")]
    words = ["sample", "--model", str(places.sd), "--prompt", "a red circle", *out]
    line = failed(capsys, words)
    assert "out of memory on the machine" in line
    assert "less with --batch-size 1, or --mixed-precision bf16, or a smaller --width" in line
    assert "less with a smaller --width" in failed(capsys, [*words, "--batch-size", "1", "--mixed-precision", "bf16"])
    words = ["evaluate", str(places.sd), "--reference", str(places.pictures), "--num-images", "8", *out]
    assert "less with `sdtune sample --batch-size 1`" in failed(capsys, words)
    monkeypatch.setattr("sdtune.evaluation.evaluate.features_of", full)
    words = ["evaluate", str(places.pictures), "--reference", str(places.pictures), *out]
    assert "a smaller network as --features" in failed(capsys, words)
    monkeypatch.setattr("sdtune.conversion.inspect.inspect", full)
    assert failed(capsys, ["inspect", str(places.sd)]).startswith("failed: out of memory on the machine (")


FAILS = """
import os

import torch

from sdtune.recipes.lora import Lora


class Full(Lora):
    '''LoRA that has no memory left in the second process, in its second batch.'''

    seen = 0

    def forward(self, batch):
        Full.seen += 1  # those of the estimates count on
        if os.environ["RANK"] == "1" and Full.seen == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(batch)
"""


@pytest.mark.fault(
    "The memory of one of several processes is full", "It says so, with what would fit, and the others end with it."
)
@pytest.mark.processes
def test_out_of_memory_in_one_process_ends_all(places, tmp_path, monkeypatch):
    """With loader workers, of a dataset in shards, which processes index together when they begin."""
    monkeypatch.setattr(batch_size, "savings", lambda cfg: iter([{"gradient_checkpointing": True}]))
    (tmp_path / "full.py").write_text(FAILS)
    shards = str(tars.unequal(tmp_path / "shards") / "{000000..000004}.tar")
    words = contract.command("lora", places, tmp_path / "run", "--dataset", shards, "--dataloader-num-workers", "1")
    started = ranks.Ranks(2, ["run", str(tmp_path / "full.py"), *words[1:]], tmp_path / "output")
    assert [rank.exit_code(120) for rank in reversed(started.all)] == [1, processes.EXIT_PEER_DIED]
    told = [line for line in started.output("err").splitlines() if line.startswith("failed: ")]
    assert len(told) == 1 and "out of memory" in told[0] and "it needs less with --" in told[0]


def test_a_signal_ends_the_search_for_what_would_fit(places, tmp_path, monkeypatch):
    def backward(self, loss):
        raise FULL

    def killed(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        pytest.fail("the signal was not heeded")

    monkeypatch.setattr(engine.Engine, "backward", backward)
    monkeypatch.setattr("sdtune.training.out_of_memory.Estimates", killed)
    assert status(contract.command("lora", places, tmp_path / "run")) == 128 + signal.SIGTERM
