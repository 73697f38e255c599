"""Projections of one input are one product: the numbers of PEFT's layers, and weights in memory once."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sdtune.models.fused_lora import fuse_adapters
from sdtune.models.joined_lora import JoinedLinear, joined
from sdtune.models.lean_layers import LeanAttention
from tests import contract
from tests.conftest import status
from tests.test_gate import stepped

IN, OUT = 8, 12


def layers(bias=True, kinds=("q", "k", "v"), **more):
    """Projections with moved adapters."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(kinds), init_lora_weights=False, **more)
    net = nn.ModuleDict({name: nn.Linear(IN, OUT, bias=bias) for name in ("q", "k", "v")}).requires_grad_(False)
    return inject_adapter_in_model(config, net)


def passed(call, net, x):
    """Results, and the gradients of the input and of each adapter."""
    x = x.clone().requires_grad_()
    found = call(x)
    sum((y.double() * (i + 1)).square().sum() for i, y in enumerate(found)).backward()
    return [*(y.detach() for y in found), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_and_gradients_are_those_of_peft(bias, dtype):
    net = layers(bias).to(dtype)
    wanted_net = copy.deepcopy(net).double()
    fuse_adapters(net)
    one = joined(list(net.values()))
    x = torch.randn(2, 5, IN, dtype=dtype)
    found = passed(one, net, x)
    wanted = passed(lambda x: [layer(x) for layer in wanted_net.values()], wanted_net, x.double())
    assert len(found) == len(wanted) == 3 + 1 + 6
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for y, other in zip(found, wanted, strict=True):
        assert y.shape == other.shape
        assert ((y.double() - other).norm() / other.norm()).item() < bound


def test_weights_stay_what_they_are_and_are_in_memory_once():
    net = layers()
    before = copy.deepcopy(net.state_dict())
    fuse_adapters(net)
    one = joined(list(net.values()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    place = one.weight.untyped_storage().data_ptr()
    assert {layer.base_layer.weight.untyped_storage().data_ptr() for layer in net.values()} == {place}


def test_what_cannot_be_joined_is_left_apart():
    assert joined(list(layers().values())) is None, "PEFT's own layers"
    for case in ("a layer without adapter", "ranks", "a weight that trains", "sides"):
        net = (
            layers(kinds=("q", "k"))
            if case == "a layer without adapter"
            else layers(**({"rank_pattern": {"v": 2}} if case == "ranks" else {}))
        )
        if case == "a weight that trains":
            net["v"].base_layer.weight.requires_grad_()
        if case == "sides":
            net["v"].base_layer.weight = nn.Parameter(torch.zeros(OUT + 1, IN), requires_grad=False)
        fuse_adapters(net)
        assert joined(list(net.values())) is None, case


def test_layers_in_another_state_compute_for_themselves():
    net = layers()
    fuse_adapters(net)
    one, x = joined(list(net.values())), torch.randn(2, 5, IN)
    assert one.fits(x) and not one.fits(x.double())
    with torch.no_grad():
        assert not one.fits(x)
    net["k"].enable_adapters(False)
    assert not one.fits(x)
    net["k"].enable_adapters(True)
    net["q"].merge()
    assert not one.fits(x)
    net["q"].unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        assert not one.fits(x)


def test_a_run_joins_what_has_one_input(places, tmp_path, monkeypatch):
    calls = []
    call = JoinedLinear.__call__
    monkeypatch.setattr(JoinedLinear, "__call__", lambda self, x: (calls.append(len(self.layers)), call(self, x))[1])
    _, engine = stepped(contract.command("lora", places, tmp_path / "run"))
    attentions = [layer for layer in engine.recipe.modules() if isinstance(layer, LeanAttention)]
    assert calls.count(3) == calls.count(2) == len(attentions) / 2 > 0
    calls.clear()
    stepped(contract.command("lora", places, tmp_path / "run", "--target-modules", "to_q", "to_v"))
    assert not calls


def test_an_adapter_of_one_attention_alone_is_trained_and_saved(places, tmp_path):
    words = contract.command("lora", places, tmp_path / "run", "--target-modules", r".*attn1\.(to_q|to_k|to_v)")
    assert status(words) == 0
    assert contract.RECIPES["lora"].artefact(tmp_path / "run")
