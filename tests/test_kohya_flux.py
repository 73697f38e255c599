"""FLUX.1 in kohya's layout: what stock diffusers reads out of it is what went in."""

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as stock

from sdtune.config.sections import UserError
from sdtune.models import formats
from sdtune.models.formats import AdapterFile, Module, kohya

WIDTH = 3072
"""Of FLUX.1: diffusers' reader knows no other."""
ROWS = {"ff.net.0.proj": 4 * WIDTH, "ff_context.net.0.proj": 4 * WIDTH, "proj_mlp": 4 * WIDTH}
DOUBLE = (
    "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_v_proj ff.net.0.proj ff_context.net.2".split()
)


def module(name, rank, alpha):
    draw = torch.Generator().manual_seed(len(name) + rank)
    columns = 4 * WIDTH if name.endswith("net.2") else 5 * WIDTH if name.endswith("proj_out") else WIDTH
    up = torch.randn(ROWS.get(name.partition("blocks.0.")[2], WIDTH), rank, generator=draw)
    return Module("lora", {"down": torch.randn(rank, columns, generator=draw), "up": up}, alpha, rank)


def effect(up, down, scale=1.0):
    """On three inputs: the whole change would fill hundreds of megabytes."""
    x = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return scale * up.double() @ (down.double() @ x)


def of(module):
    return effect(module.tensors["up"], module.tensors["down"], module.scale)


def flux(*singles):
    names = [*(f"transformer_blocks.0.{n}" for n in DOUBLE), *(f"single_transformer_blocks.0.{n}" for n in singles)]
    return AdapterFile({"transformer": {name: module(name, 2 + k % 2, 1.0 + k) for k, name in enumerate(names)}})


@pytest.mark.parametrize("singles", [["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"], ["attn.to_q"]])
def test_stock_reader_and_ours_find_what_was_written(singles, tmp_path):
    adapter, file = flux(*singles), tmp_path / "flux.safetensors"
    formats.write(file, adapter, "kohya")
    want = adapter.parts["transformer"]
    back = formats.read(file).parts["transformer"]
    assert back.keys() == want.keys()
    theirs = stock({key: tensor.clone() for key, tensor in kohya.tensors(adapter).items()})
    for name, one in want.items():
        down, up = (theirs[f"transformer.{name}.lora_{end}.weight"] for end in "AB")
        for read in (of(back[name]), effect(up, down)):
            assert (read - of(one)).norm() < 1e-6 * of(one).norm(), name
    others = {key.removesuffix(".lora_B.weight"): t for key, t in theirs.items() if key.endswith("lora_B.weight")}
    assert all(not t.any() for key, t in others.items() if key.removeprefix("transformer.") not in want)


def test_one_down_for_q_k_and_v_is_read(tmp_path):
    whole = module("q", 2, 1.0)
    up = torch.randn(3 * WIDTH, 2, generator=torch.Generator().manual_seed(0))
    tensors = {"lora_down.weight": whole.tensors["down"], "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    adapter = kohya.read(tmp_path, {f"lora_unet_double_blocks_0_img_attn_qkv.{k}": t for k, t in tensors.items()}, {})
    found = adapter.parts["transformer"]
    assert list(found) == [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    assert torch.equal(torch.cat([m.tensors["up"] for m in found.values()]), up)
    assert {m.scale for m in found.values()} == {0.5}


def test_what_cannot_be_joined_is_refused():
    dora = flux("attn.to_q")
    name, first = next(iter(dora.parts["transformer"].items()))
    dora.parts["transformer"][name] = Module("lora", first.tensors, first.alpha, first.rank, torch.ones(WIDTH))
    with pytest.raises(UserError, match="only plain LoRA can be joined"):
        kohya.tensors(dora)
    with pytest.raises(UserError, match="told by their single blocks"):
        kohya.tensors(flux())
