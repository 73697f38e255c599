"""A base in fewer bits: the gradient that flows through it, what it takes, and the artefact that it leaves."""

import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.utils.data import default_collate

from sdtune.config import parsing
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.models import families
from sdtune.models import quantize as quantization
from sdtune.models.quantize import QuantizedLinear, quantize, sizes, weight_bytes
from sdtune.recipes.lora import Lora
from sdtune.training import memory_estimate
from sdtune.training.prepare import prepare_modules
from tests.conftest import command, status

KINDS = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip(KINDS[request.param])
    return request.param


def test_codes_give_the_numbers_and_the_gradient_of_what_they_stand_for(kind):
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 96).requires_grad_(False), torch.randn(5, 7, 128, requires_grad=True)
    exact = layer.weight.detach().clone()
    quantize(nn.Sequential(layer), kind)
    assert isinstance(layer, QuantizedLinear)
    decoded = layer.decode()
    assert (decoded - exact).norm() / exact.norm() < {"int8": 0.01, "nf4": 0.12}[kind]
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = layer(x)
    assert seen == []  # no decoded weight waits for the backward pass
    y.square().sum().backward()
    mine, x.grad = x.grad, None
    other = nn.functional.linear(x, decoded, layer.bias)
    assert torch.equal(y, other)
    other.square().sum().backward()
    assert torch.allclose(mine, x.grad, rtol=1e-5, atol=1e-6)


def test_what_is_saved_is_what_was_told(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(1024, 640), nn.Linear(320, 1280)).requires_grad_(False)
    before, (plain, coded, largest) = weight_bytes(model), sizes(model, kind)
    assert plain == 4 * (1024 * 640 + 320 * 1280)
    assert largest == 4 * 1024 * 640
    quantize(model, kind)
    assert before - weight_bytes(model) == pytest.approx(plain - coded, rel=0.01)
    assert weight_bytes(model) < before * {"int8": 0.27, "nf4": 0.15}[kind]


def test_codes_come_on_top_of_a_base_that_is_its_file(kind, sd, pictures, tmp_path):
    """On a CPU, in the file's own precision, it is mapped; in another, or on a GPU, codes take its place."""
    words = command(sd, pictures, tmp_path / "run", "--quantize-base", kind)[1:]
    given = {word[2:].replace("-", "_"): value for word, value in zip(words[::2], words[1::2], strict=True)}
    layers = [m for m in UNet2DConditionModel.from_pretrained(sd / "unet").modules() if type(m) is nn.Linear]
    weights = sum(layer.weight.numel() for layer in layers)
    bits = {"int8": 8, "nf4": 4}[kind]
    for precision, device, plain in (("no", "cpu", 0), ("bf16", "cpu", 2), ("no", "cuda", 4)):
        cfg = parsing.resolve(LoraConfig, None, given | {"mixed_precision": precision}, [])
        recipe, _ = memory_estimate.meta_recipe(Lora, cfg, 2, lambda line: None)
        added, decoded = memory_estimate.quantised(recipe, torch.device(device))
        assert added == pytest.approx(weights * (bits / 8 - plain), abs=0.1 * weights)
        assert decoded == max(layer.weight.numel() for layer in layers) * {"no": 4, "bf16": 2}[precision]


def test_a_missing_library_is_named(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, KINDS[kind], None)
    extra = {"int8": "torchao", "nf4": "bnb"}[kind]
    with pytest.raises(UserError, match=f"--quantize-base {kind}: .*; pip install 'sdtune\\[{extra}\\]'"):
        quantize(nn.Sequential(nn.Linear(4, 4)), kind)


def last_loss(out, *more):
    """Of a run of a few steps on the built-in model, whose layers are wide enough to be held in codes."""
    words = ["lora", "--dataset", "tiny-hearts", "--resolution", "64", "--rank", "8", "--learning-rate", "1e-3"]
    words += ["--steps", "6", "--log-steps", "6", "--train-batch-size", "2", "--num-validation-images", "0"]
    assert status([*words, "--dataloader-num-workers", "0", "--output-dir", str(out), *more]) == 0
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    return last_loss(tmp_path_factory.mktemp("quantize") / "full")


def test_adapters_learn_on_codes_as_on_numbers_and_load_in_the_stock_pipeline(kind, full, tmp_path):
    loss = last_loss(tmp_path / kind, "--quantize-base", kind)
    assert loss == pytest.approx(full, rel={"int8": 0.02, "nf4": 0.5}[kind])
    assert loss != full
    pipe = StableDiffusionPipeline.from_pretrained(families.resolve_model("tiny"), safety_checker=None)
    pipe.load_lora_weights(tmp_path / kind, weight_name="pytorch_lora_weights.safetensors", adapter_name="own")
    assert any("own" in name for name, _ in pipe.unet.named_parameters())


def rounded(weight):
    """Codes of 8 bits a row, as those of the libraries, which need not be here."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return [codes, scale], lambda: codes.to(scale.dtype) * scale


def test_a_base_is_coded_on_its_way_to_the_device_and_adapters_are_not(sd, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "require", lambda kind: None)
    monkeypatch.setattr(quantization, "int8", rounded)
    monkeypatch.setattr(memory_estimate, "require", lambda kind: None)
    words = command(sd, pictures, tmp_path / "run", "--quantize-base", "int8", "--train-text-encoder", "true")[1:]
    given = {word[2:].replace("-", "_"): value for word, value in zip(words[::2], words[1::2], strict=True)}
    cfg = parsing.resolve(LoraConfig, None, given, [])
    recipe = Lora(cfg, torch.device("cpu"))
    dataset = recipe.dataset(2, lambda line: None)
    assert not any(isinstance(m, QuantizedLinear) for m in recipe.modules())
    prepare_modules(recipe.train(), cfg, torch.device("cpu"))
    for part in recipe.trained.values():
        layers = {name: m for name, m in part.named_modules() if isinstance(m, nn.Linear)}
        coded = {name for name, m in layers.items() if isinstance(m, QuantizedLinear)}
        assert coded == {name for name in layers if "lora_" not in name}
    assert all(p.dtype == torch.float32 for p in recipe.parameters() if p.requires_grad)
    recipe(default_collate([dataset[0], dataset[1]])).mean().backward()
    assert all(p.grad is not None for p in recipe.parameters() if p.requires_grad)
    meta, _ = memory_estimate.meta_recipe(Lora, cfg, 2, lambda line: None)
    added, _ = memory_estimate.quantised(meta, torch.device("cuda"))
    assert added < 0


def test_dora_wants_the_numbers(capsys):
    assert status(["lora", "--dataset", "d", "--quantize-base", "int8", "--use-dora", "--dry-run"]) == 2
    assert "use_dora with quantize_base" in capsys.readouterr().err
