"""Single files of Stable Diffusion 3: read as the folder they were made from, without a network."""

import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file

from sdtune.config.sections import UserError
from sdtune.models import single_file, single_file_kinds
from tests.families import pipelines
from tests.test_model_files import sample_reads, train_reads

NAMES = {
    "pos_embed.proj.": "x_embedder.proj.",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
JOINED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}
"""Names of diffusers to those of the original code (Stability-AI/sd3-ref); queries, keys and values are one matrix."""


def original(transformer):
    """The weights of a transformer in the names of the original code."""
    weights, last = dict(transformer.state_dict()), transformer.config.num_layers - 1
    # the scale and the shift of the last norms stand in the other order there
    for name in (f"transformer_blocks.{last}.norm1_context.linear", "norm_out.linear"):
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = torch.cat(weights[f"{name}.{kind}"].chunk(2)[::-1])
    found = {}
    for block in range(last + 1):
        at = f"transformer_blocks.{block}."
        for three, name in JOINED.items():
            for kind in ("weight", "bias"):
                if f"{at}{three[0]}.{kind}" in weights:
                    parts = [weights.pop(f"{at}{each}.{kind}") for each in three]
                    found[f"joint_blocks.{block}.{name}.{kind}"] = torch.cat(parts)
        for name in [name for name in weights if name.startswith(at)]:
            key, _, kind = name.removeprefix(at).rpartition(".")
            found[f"joint_blocks.{block}.{BLOCK[key]}.{kind}"] = weights.pop(name)
    for name, tensor in weights.items():
        old, new = next(((old, new) for old, new in NAMES.items() if name.startswith(old)), ("", ""))
        found[new + name.removeprefix(old)] = tensor
    return {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A small Stable Diffusion 3 whose CLIP encoders differ in width, by which diffusers tells them apart."""
    torch.manual_seed(0)
    pipe = pipelines.sd3()
    second = transformers.CLIPTextConfig(
        **pipe.text_encoder_2.config.to_dict() | {"hidden_size": 24, "num_attention_heads": 4, "projection_dim": 32}
    )
    pipe.text_encoder_2 = transformers.CLIPTextModelWithProjection(second)
    # published files leave this projection out, since it is the identity
    torch.nn.init.eye_(pipe.text_encoder.text_projection.weight)
    return pipe


@pytest.fixture
def write(pipe, tmp_path, monkeypatch):
    """Write some of the text encoders with the transformer into one file, and the settings as those of its kind."""
    pipe.save_pretrained(tmp_path / "folder")
    for weights in (tmp_path / "folder").rglob("*.safetensors"):
        if "vae" not in weights.parts:
            weights.unlink()

    def settings(folder, kind):
        without_weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(tmp_path / "folder", folder, dirs_exist_ok=True, ignore=without_weights)

    monkeypatch.setattr(single_file, "write_settings", settings)
    monkeypatch.setattr(single_file, "kind_of", lambda file, where: "sd3")

    def file(*encoders):
        found = original(pipe.transformer)
        for name, part in encoders and {"clip_l": 1, "clip_g": 2, "t5xxl": 3}.items():
            if name in encoders:
                module = getattr(pipe, "text_encoder" if part == 1 else f"text_encoder_{part}")
                weights = {key: tensor.clone() for key, tensor in module.state_dict().items()}
                if name == "clip_l":
                    del weights["text_projection.weight"]
                if name == "t5xxl":
                    del weights["encoder.embed_tokens.weight"]
                found |= {f"text_encoders.{name}.transformer.{key}": tensor for key, tensor in weights.items()}
        where = tmp_path / f"sd3-{'-'.join(encoders)}.safetensors"
        save_file(found, where)
        return where

    file.vae = tmp_path / "folder" / "vae"
    return file


@pytest.mark.fault("A base is one file of Stable Diffusion 3, with or without T5", "It is read, without a network.")
def test_a_single_file_of_stable_diffusion_3_is_the_folder(pipe, write):
    for encoders in (("clip_l", "clip_g"), ("clip_l", "clip_g", "t5xxl")):
        file = write(*encoders)
        for reader in (train_reads, sample_reads):
            read = reader(file, vae=str(write.vae))
            assert (read.text_encoder_3 is None) == (len(encoders) == 2)
            for name, part in read.components.items():
                if isinstance(part, torch.nn.Module):
                    wanted = getattr(pipe, name).state_dict()
                    assert part.state_dict().keys() == wanted.keys()
                    assert all(torch.equal(tensor, wanted[key]) for key, tensor in part.state_dict().items()), name
        read.set_progress_bar_config(disable=True)
        read("a red circle", num_inference_steps=1, height=32, width=32, max_sequence_length=16)


@pytest.mark.parametrize(
    ("encoders", "said"), [((), "holds no text encoder"), (("clip_g", "t5xxl"), "holds no text_encoders.clip_l, so")]
)
def test_a_single_file_of_stable_diffusion_3_without_clip_is_refused(encoders, said, write):
    with pytest.raises(UserError, match=f"{said}.*get a file with clip_l and clip_g in it"):
        sample_reads(write(*encoders))


@pytest.mark.parametrize(
    ("kind", "parameters"), [("sd3", 2_028_328_000), ("sd35_medium", 2_243_171_520), ("sd35_large", 8_056_627_520)]
)
def test_settings_of_stable_diffusion_3_make_the_networks_that_were_published(kind, parameters, tmp_path):
    """By their number of parameters, and T5's tokens by those of a sentence that is known; the kind by its tensors."""
    single_file_kinds.write_settings(tmp_path, kind)
    made = diffusers.SD3Transformer2DModel, diffusers.AutoencoderKL
    with torch.device("meta"):
        transformer, vae = (
            part.from_config(part.load_config(tmp_path, subfolder=name))
            for part, name in zip(made, ("transformer", "vae"), strict=True)
        )
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683
    shapes = {name: list(tensor.shape) for name, tensor in original(transformer).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "shapes_of", lambda file, where: shapes)
        assert single_file.kind_of(tmp_path / "x", "x") == kind
    if kind != "sd3":
        return
    with torch.device("meta"):
        clip = transformers.CLIPTextModelWithProjection
        encoders = [
            clip(transformers.CLIPTextConfig.from_pretrained(tmp_path / f"text_encoder{n}")) for n in ("", "_2")
        ]
        encoders.append(transformers.T5EncoderModel(transformers.T5Config.from_pretrained(tmp_path / "text_encoder_3")))
    assert [sum(p.numel() for p in part.parameters()) for part in encoders] == [123_650_304, 694_659_840, 4_762_310_656]
    tokenizer = transformers.T5TokenizerFast.from_pretrained(tmp_path / "tokenizer_3")
    assert len(tokenizer) == 32_100 and tokenizer.model_max_length == 512
    assert tokenizer("a photo of a cat").input_ids == [3, 9, 1202, 13, 3, 9, 1712, 1]
    assert tokenizer("Über ﬁsh ½").input_ids == tokenizer("Über fish 1⁄2").input_ids
