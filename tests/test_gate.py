"""The gate of speed: what makes a step faster gives the loss and each gradient of eager float64.

The loss alone is no test: a compiler has returned wrong gradients beside a loss that was right to the bit.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from sdtune.cli import imported
from sdtune.models.fused_lora import FusedLinear
from sdtune.recipes.recipe import split_loss
from sdtune.training import memory_estimate, repeated
from sdtune.training.engine import Engine
from sdtune.training.prepare import prepare_modules
from tests import contract
from tests.conftest import status
from tests.test_gpu_ready import settings

CPU = torch.device("cpu")


def made(words):
    """A recipe whose adapters have moved from their start, and a batch of two images."""
    cfg = settings(words)
    torch.manual_seed(0)
    recipe = imported(cfg.entry)(cfg, CPU)
    dataset = recipe.dataset(2, lambda line: None)
    for name, p in recipe.named_parameters():
        if p.requires_grad and ("lora_B" in name or not p.any()):
            p.data.normal_(0, 0.05)
    batch = default_collate([dataset[0], dataset[1]])
    return cfg, recipe, {name: x for name, x in batch.items() if name != "name"}


def exact(words):
    """Loss and gradients by name in eager float64, with PEFT's own layers."""
    _, recipe, batch = made(words)
    recipe.double()
    if hasattr(recipe, "family"):
        recipe.family.dtype = torch.float64
    return passed(recipe, lambda: split_loss(recipe({n: wide(x) for n, x in batch.items()}))[0])


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def passed(recipe, forward, backward=torch.Tensor.backward):
    loss = forward()
    backward(loss.mean())
    return loss.detach(), {name: p.grad for name, p in recipe.named_parameters() if p.grad is not None}


def stepped(words):
    """The same by the engine of a run."""
    cfg, recipe, batch = made(words)
    prepare_modules(recipe.train(), cfg, CPU)
    engine = Engine(recipe, cfg, memory_estimate.Alone(CPU))
    return passed(recipe, lambda: engine(engine.receive(batch))[0], engine.backward), engine


def errors(found, wanted):
    """The relative error of the loss, and of each gradient.

    That of a key's bias is zero, as it moves all scores of a query alike: it is compared with the largest.
    """
    (loss, grads), (right, right_grads) = found, wanted
    assert grads.keys() == right_grads.keys()
    of_loss = ((loss - right).norm() / right.norm()).item()
    largest = max(g.norm() for g in right_grads.values())
    scale = {name: g.norm() if g.norm() > 1e-9 * largest else largest for name, g in right_grads.items()}
    return of_loss, [((grads[name] - g).norm() / scale[name]).item() for name, g in right_grads.items()]


FAST = {
    "fused adapters": ["lora"],
    "scaled, in the text encoder too": ["lora", "--alpha", "3", "--train-text-encoder"],
    "recomputed": ["lora", "--gradient-checkpointing"],
    "computed anew": ["lora", "--no-cache"],
    "all weights": ["text-to-image"],
    "of two kinds": ["dreambooth, adapters and a word"],
    "pixels": ["ddpm"],
    "pixels, recomputed": ["ddpm", "--gradient-checkpointing"],
    "convolutions": ["lora", "--target-modules", "to_q", "conv1", "proj_in"],
    "DoRA": ["lora", "--use-dora", "--target-modules", "to_q", "conv1"],
    "LoHa": ["lora, LoHa", "--target-modules", "to_q", "conv1"],
    "LoKr": ["lora, LoKr", "--target-modules", "to_q", "conv1"],
}


@pytest.mark.parametrize("option", FAST)
def test_each_gradient_is_that_of_eager_float64(option, places, tmp_path):
    recipe, *more = FAST[option]
    words = contract.command(recipe, places, tmp_path / "run", *more)
    found, _ = stepped(words)
    of_loss, of_grads = errors(found, exact(words))
    assert of_loss < 1e-6
    assert max(of_grads) < 1e-4


def test_adapters_are_fused_to_the_bits_of_peft(places, tmp_path, monkeypatch):
    words = contract.command("lora", places, tmp_path / "run", "--alpha", "3")
    monkeypatch.setattr("sdtune.training.engine.join_projections", lambda recipe: None)
    fused, engine = stepped(words)
    assert all(isinstance(layer, FusedLinear) for name, layer in engine.recipe.named_modules() if name.endswith("to_q"))
    monkeypatch.setattr("sdtune.training.prepare.fuse_adapters", lambda recipe: None)
    plain, _ = stepped(words)
    assert torch.equal(fused[0], plain[0])
    assert all(torch.equal(grad, plain[1][name]) for name, grad in fused[1].items())


ROUNDING = {"bf16": 2**-8, "fp16": 2**-11}
"""The relative error of one number that is rounded."""
LOSS, HALF, WORST = 1.25, 7.5, 40
"""Bounds of the loss, of half of the gradients, and of each, in units of it. The worst are those of queries and keys,
differences of the softmax that are a ten-thousandth of the largest gradient; one with a wrong sign or factor is
hundreds of units off."""


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing", "--train-text-encoder", "--no-cache"]])
def test_half_precision_without_autocast_is_as_near_as_with_it(precision, more, places, tmp_path, monkeypatch):
    words = contract.command("lora", places, tmp_path / "run", *more)
    wanted = exact(words)
    found, engine = stepped([*words, "--mixed-precision", precision])
    assert engine.halves and not torch.is_autocast_enabled("cpu")
    assert {g.dtype for g in found[1].values()} == {torch.float32}
    found = found[0], {name: g / engine.scaler.get_scale() for name, g in found[1].items()}
    of_loss, of_grads = errors(found, wanted)
    monkeypatch.setattr(Engine, "adapters_in_half", lambda self: None)
    cast, engine = stepped([*words, "--mixed-precision", precision])
    cast = cast[0], {name: g / engine.scaler.get_scale() for name, g in cast[1].items()}
    of_cast_loss, of_cast = errors(cast, wanted)
    unit = ROUNDING[precision]
    for of_one, grads in ((of_loss, of_grads), (of_cast_loss, of_cast)):
        assert of_one < LOSS * unit
        assert sorted(grads)[len(grads) // 2] < HALF * unit
        assert max(grads) < WORST * unit
    assert sum(of_grads) < 1.5 * sum(of_cast)


@pytest.mark.parametrize("recipe", ["lora", "ddpm"])
def test_a_repeated_step_leaves_the_bits_of_the_ordinary_one(recipe, trained, monkeypatch, places, tmp_path, capsys):
    """What a GPU records is one function of tensors in fixed places; here it is called again each time."""
    options = [
        "--steps",
        "3",
        "--gradient-accumulation-steps",
        "2",
        "--train-batch-size",
        "1",
        "--lr-scheduler",
        "linear",
    ]
    one = trained(recipe, "one", *options)
    assert status(contract.command(recipe, places, tmp_path / "refused", "--cuda-graphs")) == 2
    assert "--cuda-graphs: needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr(repeated, "DEVICES", {"cpu"})
    other = trained(recipe, "other", *options, "--cuda-graphs")
    wanted, found = (contract.RECIPES[recipe].artefact(run) for run in (one, other))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_repeated_step_refuses_what_changes(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(repeated, "DEVICES", {"cpu"})
    for recipe, more, told in (
        ("lora", ["--no-cache"], "a step encodes each caption anew"),
        ("progressive", [], "the steps of progressive change during the run"),
    ):
        assert status(contract.command(recipe, places, tmp_path / recipe, "--cuda-graphs", *more)) == 2
        assert told in capsys.readouterr().err


class Casts(TorchDispatchMode):
    """Counts the operations that cast a trained weight, one or many at once."""

    def __init__(self, weights):
        super().__init__()
        self.places, self.count = {w.data_ptr() for w in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "copy" in str(func):
            given = {x.data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
            self.count += bool(given & self.places)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["text-to-image", "lora"])
def test_a_weight_is_cast_once_for_all_micro_batches(recipe, places, tmp_path):
    """Of all weights by autocast, of adapters by hand; both to the bits of casts for each."""
    words = contract.command(recipe, places, tmp_path / "run", "--mixed-precision", "bf16")
    found = {}
    for once in (True, False):
        cfg, recipe_, batch = made([*words, "--gradient-accumulation-steps", "2"])
        prepare_modules(recipe_.train(), cfg, CPU)
        engine = Engine(recipe_, cfg, memory_estimate.Alone(CPU))
        counts = []
        with engine.accumulating() if once else nullcontext():
            for _ in range(2):
                with Casts(engine.trained) as casts:
                    engine.backward(engine(engine.receive(batch))[0].mean())
                counts.append(casts.count)
        assert bool(engine.halves) == (recipe == "lora")
        assert counts[0] > 0 and (counts[1] == 0) == once
        found[once] = [p.grad for p in engine.trained]
    assert all(torch.equal(one, other) for one, other in zip(found[True], found[False], strict=True))
