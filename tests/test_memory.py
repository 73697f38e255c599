"""The memory of a step: the count of live bytes against counting by hand, and the estimate against real runs."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sdtune.config import parsing
from sdtune.config.commands import methods
from sdtune.config.slow_imports import imported
from sdtune.training import memory_estimate
from sdtune.training.peak_memory import PeakMemoryMode
from tests import contract


def worst(layers, width, batch, recompute=False):
    """The worst moment of a step of ``layers`` linear layers with a ReLU after each, all of one width, in fp32."""
    with FakeTensorMode():
        blocks = [nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(layers)]
        weights = [block[0].weight for block in blocks]
        x = torch.empty(batch, width)
        alive = PeakMemoryMode([*weights, x])
        for w in weights:
            w.register_post_accumulate_grad_hook(alive.mark_gradient)
        with alive:
            h = x
            for block in blocks:
                h = checkpoint(block, h, use_reentrant=False) if recompute else block(h)
            alive.kind = "temporary"
            h.backward(torch.empty_like(h))
        return alive.worst


def test_live_bytes_are_those_counted_by_hand():
    layers, width, batch = 3, 64, 512
    tensor, weight = 4 * batch * width, 4 * width * width
    found = worst(layers, width, batch)
    # autograd keeps what each ReLU gave; a linear layer's own result is gone once the ReLU is through. Going back, the
    # worst moment has the seed, the gradients after and before a linear layer, and its weight's, not handed on
    assert found["activations"] == layers * tensor
    assert found["temporary"] == 3 * tensor + weight
    assert found["gradients"] == 0
    assert worst(layers, width, batch, recompute=True).total() <= found.total()


def outlined(words):
    """An estimate by the command line of a run."""
    config = next(c for c in methods() if c.method == words[0])
    names = [word[2:].replace("-", "_") for word in words[1::2]]
    cfg = parsing.resolve(config, None, dict(zip(names, words[2::2], strict=True)), [])
    recipe, dataset = memory_estimate.meta_recipe(imported(cfg.entry), cfg, cfg.train_batch_size, lambda line: None)
    return memory_estimate.estimate(recipe, dataset, torch.device("cpu"), base=0)


def test_what_the_cache_replaces_is_not_there_in_a_step(places, tmp_path):
    words = contract.command("lora", places, tmp_path / "none")
    cached, not_cached = outlined(words), outlined([*words, "--cache", "false"])
    files = [*places.sd.glob("vae/*.safetensors"), *places.sd.glob("text_encoder/*.safetensors")]
    replaced = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert not_cached.weights - cached.weights == pytest.approx(replaced, rel=0.01)


def test_a_vae_that_encodes_beside_the_first_steps_is_counted(places, tmp_path):
    words = contract.command("lora", places, tmp_path / "none")
    before, beside = outlined(words), outlined([*words, "--lazy-cache", "true"])
    vae = sum(tensor.nbytes for file in places.sd.glob("vae/*.safetensors") for tensor in load_file(file).values())
    assert beside.weights - before.weights == pytest.approx(vae, rel=0.01)


LIBRARY = {"adamw": "torch", "adamw8bit": "bitsandbytes", "torchao_adamw4bit": "torchao"}


@pytest.mark.parametrize("optimizer", LIBRARY)
def test_what_a_checkpoint_holds_is_what_was_estimated(optimizer, trained, places, tmp_path):
    pytest.importorskip(LIBRARY[optimizer])
    more = ["--optimizer", optimizer, "--rank", "32", "--use-ema", "true"]
    need = outlined(contract.command("lora", places, tmp_path / "none", *more))
    out = trained("lora", "run", *more[:4], "--use-ema", "--steps", "1")
    held = next((out / "checkpoints").glob("step-*"))
    kept = {name: load_file(held / f"{name}.safetensors") for name in ("optimizer", "average")}
    moments = sum(t.nbytes for name, t in kept["optimizer"].items() if not name.startswith("|"))
    assert need.optimizer == moments
    assert need.average == sum(t.nbytes for t in kept["average"].values())


CELLS = {
    "adapters": ["lora", "--dataset", "tiny-hearts", "--resolution", "64", "--train-batch-size", "8", "--no-cache"],
    "all weights, checkpointing, average": [
        *("ddpm", "--dataset", "tiny-hearts", "--resolution", "32", "--train-batch-size", "2"),
        *("--block-out-channels", "128", "256", "256", "--layers-per-block", "1", "--gradient-checkpointing"),
    ],
}


FORKS = """
import json, sys
from multiprocessing import get_context
import sdtune.recipes.ddpm, sdtune.recipes.lora, sdtune.training.check, sdtune.training.loop
from sdtune.cli import main
for words in json.loads(sys.argv[1]):
    process = get_context("fork").Process(target=main, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
"""
"""Each command in a process that holds what a fresh one holds, which is imported once."""


@pytest.mark.processes
def test_the_estimate_is_within_a_tenth_of_what_a_run_takes(tmp_path):
    """As bench/memory.py, with a malloc that gives memory back at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
    short = ["--steps", "2", "--log-steps", "2", "--num-validation-images", "0", "--dataloader-num-workers", "0"]
    lines = []
    for cell, words in CELLS.items():
        words = [*words, *short, "--output-dir", str(tmp_path / cell)]
        lines += [["check", *words], words]
    started = [sys.executable, "-c", FORKS, json.dumps(lines)]
    ended = subprocess.run(started, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    estimates = re.findall(r"^memory: ([\d.]+) GB", ended.stdout, re.M)
    for cell, estimate in zip(CELLS, estimates, strict=True):
        peak = re.search(r'"peak_memory": ([\d.]+)', (tmp_path / cell / "metrics.jsonl").read_text())
        assert float(estimate) * 1e9 == pytest.approx(float(peak[1]), rel=0.1), cell
