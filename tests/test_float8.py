"""Products of 8-bit floats: near those of full numbers, gradients too, and refused where nothing multiplies them."""

import pytest
import torch
from torch import nn

from sdtune.models.float8 import compute_in_float8
from tests.conftest import command, status

CPU = torch.device("cpu")


class Odd(nn.Module):
    """Layers that fit, one that does not, and an adapter."""

    def __init__(self):
        super().__init__()
        self.wide, self.odd, self.lora_a = nn.Linear(64, 48), nn.Linear(48, 20), nn.Linear(20, 16)

    def forward(self, x):
        return self.lora_a(self.odd(self.wide(x)))


def test_products_and_gradients_are_near_those_of_full_numbers():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    full, small = Odd(), Odd()
    small.load_state_dict(full.state_dict())
    compute_in_float8(small, CPU, emulate=True)
    assert [type(layer) is nn.Linear for layer in small.children()] == [False, True, True]
    assert small.state_dict().keys() == full.state_dict().keys()
    x = torch.randn(32, 64)
    for model in (full, small):
        model(x).square().mean().backward()
    for name, p in full.named_parameters():
        grad = small.get_parameter(name).grad
        error = (grad - p.grad).norm() / p.grad.norm()
        assert 0 < error < 0.1, name


def test_a_device_that_cannot_is_told(sd, pictures, tmp_path, capsys):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("this GPU can")
    assert status([*command(sd, pictures, tmp_path / "run"), "--mixed-precision", "fp8"]) == 2
    assert "--mixed-precision fp8: needs a GPU of compute capability 8.9" in capsys.readouterr().err
