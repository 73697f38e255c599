"""What a GPU or a Mac needs, where there is none: meta tensors stand for those of a device, dispatch modes look on."""

import json
import os
import sys
import weakref
from datetime import timedelta
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdtune.cli import imported
from sdtune.config import parsing
from sdtune.config.commands import methods
from sdtune.config.errors import RunFailed, UserError
from sdtune.diffusion import tables
from sdtune.models import float8, single_file
from sdtune.recipes.recipe import split_loss
from sdtune.training import accelerator, engines
from sdtune.training.batch_size import in_a_fork
from sdtune.training.engine import Engine, nan_unless_finite
from sdtune.training.log_window import Window
from sdtune.training.memory_estimate import heaviest_batch, meta_recipe
from sdtune.training.slices import copy_in_main_memory
from sdtune.training.state import State
from tests import contract, ranks
from tests.compare import difference
from tests.conftest import status
from tests.contract import RECIPES
from tests.test_engine import FSDP

META = torch.device("meta")


class Watch(TorchDispatchMode):
    """Notes operations that copy between the main memory and meta, and the 64-bit floats on meta."""

    def __init__(self):
        super().__init__()
        self.copies, self.float64 = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors if x.dim() or "copy" in str(func)}) > 1:
            self.copies.append(str(func))
        if any(x.device.type == "meta" and x.dtype == torch.float64 for x in tensors):
            self.float64.append(str(func))
        return out


def settings(words):
    """The config of a command line."""
    config = next(c for c in methods() if c.method == words[0])
    values, name = {}, ""
    for word in words[1:]:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            off = name.startswith("no_") and name not in config.model_fields
            name = name.removeprefix("no_") if off else name
            values[name] = "false" if off else "true"
        else:
            more = values[name] if isinstance(values[name], list) else []
            values[name] = [*more, word]
    values = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in values.items()
    }
    return parsing.resolve(config, None, values, [])


def on_meta(words):
    """An engine of a run whose device is meta, and a batch of it in the main memory."""
    cfg = settings(words)
    recipe, dataset = meta_recipe(imported(cfg.entry), cfg, cfg.train_batch_size, lambda line: None)
    recipe.train()
    recipe.total_steps = 4
    batch = heaviest_batch(cfg, dataset)
    return Engine(recipe, cfg, SimpleNamespace(device=META, num_processes=1)), batch


def watch_steps(words, monkeypatch):
    """Three steps of a run on meta; the first makes what is made once, the last is of a device without float64."""
    engine, batch = on_meta(words)
    window = Window(engine, 0, 0)
    seen = []
    for without in ({"mps"}, {"mps"}, {"mps", "meta"}):
        monkeypatch.setattr(tables, "WITHOUT_FLOAT64", without)
        received = engine.receive(batch)
        seen.append(Watch())
        with seen[-1]:
            loss, figures = split_loss(engine.recipe(received))
            nan_unless_finite(loss.mean()).backward()
            window.add(loss, figures, [])
            window.end_step(nn.utils.clip_grad_norm_(engine.trained, 1.0))
    assert seen[1].copies == []
    return seen


STEPS = {"lora": ["--snr-gamma", "5"], "consistency, distilled": ["--match-steps", "0"]}


@pytest.mark.parametrize("recipe", STEPS)
def test_a_step_copies_nothing_but_its_batch_and_needs_no_float64(recipe, places, tmp_path, monkeypatch):
    """Each copy from the main memory would make the host wait for the GPU, and Apple's devices have no float64."""
    first, second, third = watch_steps(contract.command(recipe, places, tmp_path / "run", *STEPS[recipe]), monkeypatch)
    assert first.copies != []  # what is fixed is copied by the first step
    assert second.float64 != []
    assert third.float64 == []


@pytest.mark.processes
def test_slices_of_a_new_word_learn_what_the_whole_word_learns(places, shared, tmp_path):
    """Its norms are figures of each step, and a term of the loss."""
    options = ["--steps", "2", "--norm-weight", "0.1"]
    words = contract.command("textual-inversion", places, tmp_path / "run", *options, "--train-batch-size", "1")
    ranks.train(2, words, tmp_path / "printed", **FSDP)
    one = RECIPES["textual-inversion"].artefact(shared("textual-inversion", *options))
    assert difference(one, RECIPES["textual-inversion"].artefact(tmp_path / "run")) < 1e-6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--use-8bit-adam"], "--use-8bit-adam: the kernels of bitsandbytes do not work on slices"),
        (["--optimizer", "bitsandbytes.optim:AdamW"], "--optimizer torchao_adamw8bit does"),
        (["--quantize-base", "nf4"], "--quantize-base nf4: saves no memory where the weights are in slices"),
    ],
)
def test_what_cannot_be_sliced_is_refused(options, told, places, tmp_path):
    with pytest.raises(UserError, match=told):
        engines.refuse_what_cannot_be_sliced(settings(contract.command("lora", places, tmp_path, *options)))


def test_nccl_waits_longer_than_gloo_which_has_the_words(monkeypatch):
    cfg = SimpleNamespace(ddp_timeout=30)
    assert accelerator.collective_timeout(cfg) == timedelta(seconds=30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert accelerator.collective_timeout(cfg) == timedelta(seconds=90)


def test_a_search_in_a_fork_hands_back_what_it_finds_and_what_it_refuses():
    assert in_a_fork(lambda: {"pid": os.getpid()})["pid"] != os.getpid()

    def refuse():
        raise UserError("not even one image fits")

    with pytest.raises(UserError, match="not even one image fits"):
        in_a_fork(refuse)
    with pytest.raises(RunFailed, match="ended with exit code 7"):
        in_a_fork(lambda: os._exit(7))


@pytest.mark.processes
def test_a_single_file_is_converted_by_one_of_the_processes_that_want_it(tmp_path, monkeypatch):
    file, made = tmp_path / "base.safetensors", tmp_path / "made"
    file.write_bytes(b"weights")
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))

    def convert(new, settings):
        with made.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        new.mkdir()

    def want():
        single_file._converted(file, "--model", "v1", convert)

    wanting = [ranks.Forked(want, tmp_path / f"rank-{k}") for k in range(3)]
    assert [rank.exit_code() for rank in wanting] == [0, 0, 0]
    assert len(made.read_text().splitlines()) == 1


def test_deterministic_kernels_are_asked_for_and_named_where_there_are_none(trained, places, tmp_path, capsys):
    asked = []

    def backward(self, loss):
        asked.append(torch.are_deterministic_algorithms_enabled())
        raise RuntimeError("upsample_backward does not have a deterministic implementation, but you set it. More.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "backward", backward)
        words = contract.command("ddpm", places, tmp_path / "run", "--deterministic")
        assert status(words) == 2
    assert "--deterministic: upsample_backward does not have" in capsys.readouterr().err
    trained("ddpm", "other", "--steps", "1")
    assert asked == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_samples_are_not_drawn_in_8_bits(tmp_path, capsys):
    assert status(["sample", "--mixed-precision", "fp8", "--prompt", "a", "--output-dir", str(tmp_path)]) == 2
    assert "--mixed-precision: 'fp8' is none of no, fp16, bf16" in capsys.readouterr().err


def test_8_bit_products_pad_the_rows_of_small_batches(monkeypatch):
    """The gradient of a weight sums over them, and the product of a GPU wants multiples of 16."""
    asked = []
    library = ModuleType("torchao.float8")
    library.Float8LinearConfig = lambda **options: options
    library.convert_to_float8_training = lambda module, config, module_filter_fn: asked.append(config)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", library)
    float8.compute_in_float8(nn.Linear(32, 48), torch.device("cpu"), emulate=True)
    assert asked == [{"emulate": True, "pad_inner_dim": True}]


def test_a_checkpoint_gathers_a_tensor_at_a_time():
    """Whole on each device at once, those of a large model would not fit; other processes keep none."""
    gathered = []

    def whole(tensor):
        assert not any(other() is not None for other in gathered)
        made = tensor.clone()
        gathered.append(weakref.ref(made))
        return made

    state = State.__new__(State)
    state.engine, state.accelerator = SimpleNamespace(weight=whole), SimpleNamespace(is_main_process=False)
    assert state.gather_tensors({str(k): torch.zeros(3) for k in range(4)}) == {}
    assert len(gathered) == 4


def test_what_is_exported_from_slices_is_copied_straight_to_main_memory():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen, module = [], nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    module[0].bias.requires_grad_(True)
    with Names():
        copied = copy_in_main_memory(module)
    assert "clone" not in seen  # which would be on the device
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in module.parameters()]
    for (name, one), (other_name, other) in zip(module.state_dict().items(), copied.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other) and one.data_ptr() != other.data_ptr()


def test_a_trace_of_some_steps_opens_in_a_browser(trained):
    run = trained("ddpm", "run", "--steps", "3", "--profile", "1", "--log-steps", "1")
    trace = json.loads((run / "trace.json").read_text())
    assert any("convolution" in event.get("name", "") for event in trace["traceEvents"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line for line in lines if "forward" in line]
    assert all(line["forward"] > 0 and line["backward"] > 0 and line["optimizer"] > 0 for line in shares)
