"""Single files of Stable Diffusion 2 and XL, whose text encoder has the names of open_clip, against their folders."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sdtune.models import single_file
from tests.families import pipelines
from tests.test_model_files import BLOCKS, READERS, original, original_vae
from tests.tinysd import tiny_sd

XL_BLOCKS = {
    "conv_in.": "input_blocks.0.0.",
    "down_blocks.0.resnets.0.": "input_blocks.1.0.",
    "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.",
    "down_blocks.1.attentions.0.": "input_blocks.3.1.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.",
    "up_blocks.0.attentions.0.": "output_blocks.0.1.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.",
    "up_blocks.0.attentions.1.": "output_blocks.1.1.",
    "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.2.conv.",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
} | {
    old: new for old, new in BLOCKS.items() if old.startswith(("mid_block", "time_embedding", "conv_norm", "conv_out"))
}
"""The UNet of the small SDXL in the names of the original code."""
WHOLE = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip(encoder):
    """A text encoder of CLIP as open_clip has it: queries, keys and values are one matrix, the projection is turned."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    found = {new: weights.pop(old) for old, new in WHOLE.items()}
    if "text_projection.weight" in weights:
        found["text_projection"] = weights.pop("text_projection.weight").T
    for layer in range(encoder.config.num_hidden_layers):
        at, to = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            joined = [weights.pop(f"{at}self_attn.{part}_proj.{kind}") for part in "qkv"]
            found[f"{to}attn.in_proj_{kind}"] = torch.cat(joined)
            found |= {f"{to}{new}.{kind}": weights.pop(f"{at}{old}.{kind}") for old, new in LAYER.items()}
    assert not weights
    return found


def sdxl():
    """Its text encoders differ in width, by which diffusers tells them apart."""
    pipe = pipelines.sdxl()
    narrow = {"hidden_size": 24, "num_attention_heads": 4}
    pipe.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**pipe.text_encoder_2.config.to_dict() | narrow))
    pipe.unet = pipelines.sdxl_unet(32 + 24, 32, 6)
    return pipe


@pytest.mark.parametrize(("kind", "build"), [("v2", tiny_sd), ("xl_base", sdxl)])
def test_a_single_file_with_a_text_encoder_of_open_clip_is_the_folder(kind, build, tmp_path, monkeypatch):
    pipe = build()
    pipe.save_pretrained(tmp_path / "folder")
    blocks = XL_BLOCKS if kind == "xl_base" else BLOCKS
    found = {original(name, blocks): tensor for name, tensor in pipe.unet.state_dict().items()}
    found |= dict(original_vae(name, tensor) for name, tensor in pipe.vae.state_dict().items())
    if kind == "xl_base":
        prefix = "conditioner.embedders.0.transformer.text_model."
        first = {name.removeprefix("text_model."): t for name, t in pipe.text_encoder.state_dict().items()}
        found |= {prefix + name: tensor for name, tensor in first.items()}
    second, prefix = ("text_encoder_2", "conditioner.embedders.1.model.")
    if kind == "v2":
        second, prefix = "text_encoder", "cond_stage_model.model."
    found |= {prefix + name: tensor for name, tensor in open_clip(getattr(pipe, second)).items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, tmp_path / "model.safetensors")

    def settings(folder, kind):
        without_weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(tmp_path / "folder", folder, dirs_exist_ok=True, ignore=without_weights)

    monkeypatch.setattr(single_file, "write_settings", settings)
    monkeypatch.setattr(single_file, "kind_of", lambda file, where: kind)
    for reader in READERS:
        read = reader(tmp_path / "model.safetensors")
        parts = [name for name, part in read.components.items() if isinstance(part, torch.nn.Module)]
        assert set(parts) >= {"unet", "vae", "text_encoder", second}
        for name in parts:
            ours, theirs = (getattr(p, name).state_dict() for p in (read, pipe))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), name
