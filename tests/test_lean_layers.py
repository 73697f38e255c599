"""Layers that keep less for the backward pass, or are faster, give what those of diffusers give."""

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

ANY_WEIGHT = dict.fromkeys(lean_layers.LARGE_WEIGHT, 0)


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


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("how", [{"padding": 1}, {"padding": 1, "stride": 2}, {"bias": False}])
def test_a_convolution_with_few_places_is_one_product(how, frozen, monkeypatch):
    monkeypatch.setattr(lean_layers, "LARGE_WEIGHT", ANY_WEIGHT)
    calls = []
    product = lean_layers.by_product
    monkeypatch.setattr(lean_layers, "by_product", lambda *given: (calls.append(1), product(*given))[1])
    torch.manual_seed(0)
    stock = nn.Conv2d(8, 16, 3, **how).requires_grad_(not frozen)
    lean, exact_one = copy.deepcopy(stock), copy.deepcopy(stock).double()
    keep_less(lean)
    x = torch.randn(2, 8, 16, 16)
    (y, grads, _), (wanted, right, _) = passed(lean, [x]), passed(exact_one, [x.double()])
    assert calls
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(grads[0].double(), right[0], rtol=0, atol=1e-4)
    for p, q in zip(lean.parameters(), exact_one.parameters(), strict=True):
        assert frozen or ((p.grad - q.grad).norm() / q.grad.norm()).item() < 1e-6


def test_in_bf16_a_product_is_as_near_as_a_convolution(monkeypatch):
    """Where a processor has no products of bf16, the bias is added to what was rounded already: a factor of root 2."""
    torch.manual_seed(0)
    stock = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 64, 8, 8)
    y, grads, _ = passed(copy.deepcopy(stock).double(), [x.double()])
    stock, x = stock.bfloat16(), x.bfloat16()
    usual_y, usual_grads, _ = passed(stock, [x])
    lean = copy.deepcopy(stock)
    keep_less(lean)
    monkeypatch.setattr(lean_layers, "LARGE_WEIGHT", ANY_WEIGHT)
    assert lean.is_product(x)
    found_y, found_grads, _ = passed(lean, [x])
    for found, usual, right in ((found_y, usual_y, y), (found_grads[0], usual_grads[0], grads[0])):
        assert (found - right).norm() < 1.5 * (usual - right).norm()


def test_without_gradients_a_convolution_has_the_bits_of_the_library(monkeypatch):
    monkeypatch.setattr(lean_layers, "LARGE_WEIGHT", ANY_WEIGHT)
    stock, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(2, 64, 8, 8)
    lean = copy.deepcopy(stock)
    keep_less(lean)
    monkeypatch.setattr(lean_layers, "by_product", lambda *given: pytest.fail("as a product"))
    with torch.no_grad():
        assert torch.equal(lean(x), stock(x))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(8, 16, 3, dilation=2), torch.randn(2, 8, 8, 8)),
        (nn.Conv2d(8, 16, 3, groups=2), torch.randn(2, 8, 8, 8)),
        (nn.Conv2d(8, 16, 3, padding="same"), torch.randn(2, 8, 8, 8)),
        (nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), torch.randn(2, 8, 8, 8)),
        (nn.Conv2d(8, 16, 3), torch.randn(9, 8, 8, 8)),
        (nn.Conv2d(8, 16, 3).double(), torch.randn(2, 8, 8, 8).double()),
        (nn.Conv2d(8, 16, 3).to("meta"), torch.randn(2, 8, 8, 8, device="meta")),
    ],
)
def test_other_convolutions_are_left_to_the_library(layer, x, monkeypatch):
    monkeypatch.setattr(lean_layers, "LARGE_WEIGHT", ANY_WEIGHT)
    monkeypatch.setattr(lean_layers, "by_product", lambda *given: pytest.fail("as a product"))
    stock = copy.deepcopy(layer)
    keep_less(layer)
    y, wanted = layer(x), stock(x)
    assert y.shape == wanted.shape
    assert y.device.type == "meta" or torch.equal(y, wanted)


def test_a_step_by_products_has_the_gradients_of_eager_float64(places, tmp_path, monkeypatch):
    words = contract.command("lora", places, tmp_path / "run", "--target-modules", r".*(to_q|conv1)")
    monkeypatch.setattr(lean_layers, "LARGE_WEIGHT", ANY_WEIGHT)
    of_loss, of_grads = errors(stepped(words)[0], exact(words))
    assert of_loss < 1e-6
    assert max(of_grads) < 1e-4


@pytest.mark.parametrize("size", [0, lean_layers.LARGE])
def test_a_step_has_the_gradients_of_eager_float64(size, places, tmp_path, monkeypatch):
    some = r".*(to_q|to_v|conv1|net\.0\.proj)"
    words = contract.command("lora", places, tmp_path / "run", "--target-modules", some)
    wanted = exact(words)
    monkeypatch.setattr(lean_layers, "LARGE", size)
    monkeypatch.setattr("sdtune.training.engine.join_projections", lambda recipe: None)
    of_loss, of_grads = errors(stepped(words)[0], wanted)
    assert of_loss < 1e-6
    assert max(of_grads) < 1e-4
    with monkeypatch.context() as patch:
        patch.setattr("sdtune.training.prepare.keep_less", lambda recipe: None)
        stock, _ = stepped(words)
    lean, _ = stepped(words)
    assert torch.equal(stock[0], lean[0])
    assert all(torch.equal(grad, lean[1][name]) for name, grad in stock[1].items())
