"""Layers that keep less for the backward pass give the bits of those of diffusers."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdtune.models import lean_layers
from sdtune.models.lean_layers import keep_less
from tests import contract
from tests.test_gate import errors, exact, stepped

LAYERS = {
    "convolution": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), [(2, 8, 16, 16)]),
    "residual block": (lambda: ResnetBlock2D(in_channels=8, out_channels=16, groups=4), [(2, 8, 16, 16), (2, 512)]),
    "block of one width, halved": (
        lambda: ResnetBlock2D(in_channels=8, groups=4, output_scale_factor=2.0, skip_time_act=True),
        [(2, 8, 16, 16), (2, 512)],
    ),
    "gated layer": (lambda: GEGLU(8, 32), [(2, 64, 8)]),
    "attention to itself": (lambda: Attention(8, heads=2, dim_head=4, bias=True), [(2, 64, 8)]),
    "attention": (lambda: Attention(8, 12, heads=2, dim_head=4), [(2, 64, 8), (2, 5, 12)]),
}
KEPT = {"convolution": 0.1, "residual block": 0.6, "block of one width, halved": 0.6, "gated layer": 0.8}
"""The share of what diffusers' layer keeps that is kept at the most."""


def passed(layer, inputs):
    """What a layer gives, the gradients of its inputs, and the bytes that it keeps besides its weights."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its place is not used again
        return tensor

    given = [x.clone().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(*given)
    size = sum(storage.nbytes() for storage in kept.values())
    y.square().sum().backward()
    return y.detach(), [x.grad for x in given], size


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_layer_gives_the_same_bits_and_keeps_less(name, monkeypatch):
    monkeypatch.setattr(lean_layers, "LARGE", 0)
    torch.manual_seed(0)
    make, shapes = LAYERS[name]
    stock = make().train().requires_grad_(False)
    lean = copy.deepcopy(stock)
    keep_less(lean)
    assert type(lean) is not type(stock)
    inputs = [torch.randn(shape) for shape in shapes]
    (y, grads, kept), (wanted, right, before) = passed(lean, inputs), passed(stock, inputs)
    assert torch.equal(y, wanted)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, right, strict=True))
    assert kept <= KEPT.get(name, 1) * before


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_trains_gets_the_gradients_of_its_weights(name, monkeypatch):
    monkeypatch.setattr(lean_layers, "LARGE", 0)
    torch.manual_seed(0)
    make, shapes = LAYERS[name]
    stock = make().train()
    lean = copy.deepcopy(stock)
    keep_less(lean)
    inputs = [torch.randn(shape) for shape in shapes]
    for layer in (stock, lean):
        passed(layer, inputs)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(stock.parameters(), lean.parameters(), strict=True))


@pytest.mark.parametrize("size", [0, lean_layers.LARGE])
def test_a_step_has_the_gradients_of_eager_float64(size, places, tmp_path, monkeypatch):
    some = r".*(to_q|to_v|conv1|net\.0\.proj)"
    words = contract.command("lora", places, tmp_path / "run", "--target-modules", some)
    wanted = exact(words)
    monkeypatch.setattr(lean_layers, "LARGE", size)
    of_loss, of_grads = errors(stepped(words)[0], wanted)
    assert of_loss < 1e-6
    assert max(of_grads) < 1e-4
    with monkeypatch.context() as patch:
        patch.setattr("sdtune.training.prepare.keep_less", lambda recipe: None)
        stock, _ = stepped(words)
    lean, _ = stepped(words)
    assert torch.equal(stock[0], lean[0])
    assert all(torch.equal(grad, lean[1][name]) for name, grad in stock[1].items())
