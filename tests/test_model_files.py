"""Base models from people's files: single files of every kind, and folders that are damaged or hostile, in one line."""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.models import families, single_file, single_file_kinds
from sdtune.models.loading import load_pipeline
from tests.conftest import command, status

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def base(sd, tmp_path):
    return shutil.copytree(sd, tmp_path / "base")


def train_reads(model, **options):
    """Read all of a base as training does."""
    cfg = LoraConfig(dataset="d", model=str(model), resolution=32, **options)
    family = families.load(cfg, torch.device("cpu"), torch.float32)
    family.tokenizer  # noqa: B018
    return family.pipeline()


def sample_reads(model, **options):
    return load_pipeline(SampleConfig(model=str(model), prompt=["x"], **options))


READERS = [train_reads, sample_reads]


# ---- damaged and hostile folders -----------------------------------------------------------------------


def edit(name, change):
    def spoil(base):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(change(content)))

    return spoil


def tensors(name, change):
    def spoil(base):
        found = load_file(base / name)
        change(found)
        save_file(found, base / name, metadata={"format": "pt"})

    return spoil


def first(found):
    return sorted(found)[5]


def drop(found):
    del found[first(found)]


def poison(value):
    def change(found):
        found[first(found)].view(-1)[:3] = value

    return change


def pickled(base):
    torch.save(load_file(base / TEXT), base / "text_encoder" / "pytorch_model.bin")
    (base / TEXT).unlink()


STEPS = "scheduler/scheduler_config.json"
SPOILT = {
    "a list": (lambda base: (base / "model_index.json").write_text("[1]"), "model_index.json is a list, not a table"),
    "not JSON": (lambda base: (base / "model_index.json").write_text("{"), "model_index.json is not JSON"),
    "not text": (lambda base: (base / "model_index.json").write_bytes(b"\xff\xfe\0"), "cannot be read as text"),
    "nested": (lambda base: (base / "model_index.json").write_text("[" * 100_000), "model_index.json is not JSON"),
    "class a number": (edit("model_index.json", lambda x: x | {"_class_name": 3}), "names its class as 3"),
    "part a number": (edit("model_index.json", lambda x: x | {"unet": ["diffusers", 3]}), "names unet as"),
    "UNet lacks a tensor": (tensors(UNET, drop), r"unet: 1 of \d+ tensors are missing from its file"),
    "VAE lacks a tensor": (tensors(VAE, drop), r"vae: 1 of \d+ tensors are missing"),
    "text encoder lacks a tensor": (tensors(TEXT, drop), r"text_encoder: 1 of \d+ tensors are missing"),
    "NaN in the UNet": (tensors(UNET, poison(torch.nan)), "unet: 3 numbers in 1 tensors are NaN or infinite"),
    "infinity in the VAE": (tensors(VAE, poison(torch.inf)), "vae: 3 numbers in 1 tensors are NaN"),
    "NaN in the text encoder": (tensors(TEXT, poison(torch.nan)), "text_encoder: 3 numbers in 1 tensors"),
    "a pickle": (pickled, "text_encoder: a pickle, which can run code"),
    "a file cut short": (lambda base: (base / UNET).write_bytes((base / UNET).read_bytes()[:5000]), "unet: "),
    "no steps": (
        edit(STEPS, lambda x: x | {"num_train_timesteps": 0}),
        "num_train_timesteps is 0, not a number from 1",
    ),
    "steps below zero": (edit(STEPS, lambda x: x | {"num_train_timesteps": -5}), "num_train_timesteps is -5"),
    "10^12 steps": (edit(STEPS, lambda x: x | {"num_train_timesteps": 10**12}), "num_train_timesteps is 1000000000000"),
    "steps as text": (edit(STEPS, lambda x: x | {"num_train_timesteps": "many"}), "num_train_timesteps is 'many'"),
    "settings a list": (edit("unet/config.json", lambda x: [x]), "unet/config.json is a list, not a table of settings"),
    "settings not JSON": (lambda base: (base / STEPS).write_text("{"), "scheduler_config.json is not JSON"),
    "latents by zero": (edit("vae/config.json", lambda x: x | {"scaling_factor": 0}), "scaling_factor is 0, not a num"),
    "a small vocabulary": (
        lambda base: (
            edit("text_encoder/config.json", lambda x: x | {"vocab_size": 300})(base),
            tensors(TEXT, lambda found: found.update({k: v[:300] for k, v in found.items() if "token_emb" in k}))(base),
        ),
        r"the tokenizer has \d+ tokens, its text encoder 300",
    ),
    "a huge window": (
        edit("tokenizer/tokenizer_config.json", lambda x: x | {"model_max_length": 10**6}),
        "the tokenizer takes 1000000 tokens at a time, its text encoder 77",
    ),
    "inpainting": (
        lambda base: (
            edit("unet/config.json", lambda x: x | {"in_channels": 9})(base),
            tensors(UNET, lambda found: found.update({"conv_in.weight": torch.zeros(16, 9, 3, 3)}))(base),
        ),
        "its UNet takes 9 channels, its VAE gives 4: an inpainting",
    ),
}


@pytest.mark.fault(
    "A model folder is incomplete, damaged, or says what no pipeline says",
    "Refused in one line, by training and by sampling.",
)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_base_is_refused_in_one_line(name, reader, base):
    spoil, said = SPOILT[name]
    spoil(base)
    with pytest.raises(UserError) as told:
        reader(base)
    assert re.search(said, str(told.value))
    assert "\n" not in str(told.value)


def test_the_command_line_ends_with_exit_code_2_before_it_trains(base, pictures, tmp_path, capsys):
    tensors(UNET, poison(torch.nan))(base)
    assert status(command(base, pictures, tmp_path / "run", "--steps", "1")) == 2
    assert "NaN or infinite" in capsys.readouterr().err


# ---- single files --------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCKS = {
    "conv_in.": "input_blocks.0.0.",
    "down_blocks.0.resnets.0.": "input_blocks.1.0.",
    "down_blocks.0.attentions.0.": "input_blocks.1.1.",
    "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.",
    "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.1.conv.",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.",
    "up_blocks.1.attentions.0.": "output_blocks.2.1.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    "up_blocks.1.attentions.1.": "output_blocks.3.1.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
"""The UNet of the tests in the names of the original code."""


def original(name, blocks=BLOCKS):
    old, new = next((old, new) for old, new in blocks.items() if name.startswith(old))
    rest = name.removeprefix(old)
    part = rest.partition(".")[0]
    return f"model.diffusion_model.{new}{rest.replace(part, RESNET.get(part, part), 1)}"


VAE_NAMES = {
    "down_blocks.": "down.",
    "up_blocks.0.": "up.1.",
    "up_blocks.1.": "up.0.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "resnets.": "block.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
"""The names of the original code for parts of a VAE of two levels."""


def original_vae(name, tensor):
    """A tensor of the VAE as the original code has it: its attention is made of convolutions."""
    for old, new in VAE_NAMES.items():
        name = name.replace(old, new)
    attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
    return f"first_stage_model.{name}", tensor[:, :, None, None] if attention else tensor


def checkpoint(sd, file, text=True, vae=False):
    """The UNet and the text encoder of a folder in one file, with the VAE or without."""
    found = {original(name): tensor for name, tensor in load_file(sd / UNET).items()}
    if vae:
        found |= dict(original_vae(name, tensor) for name, tensor in load_file(sd / VAE).items())
    if text:
        found |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in load_file(sd / TEXT).items()}
    save_file(found, file)
    return file


@pytest.fixture
def small_settings(sd, monkeypatch):
    """In place of the settings of Stable Diffusion 1 those of the small pipeline of the tests."""

    def write(folder, kind):
        shutil.copytree(sd, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))

    monkeypatch.setattr(single_file, "write_settings", write)


def test_a_single_file_without_a_vae_takes_one_from_anywhere(sd, tmp_path, small_settings):
    file = checkpoint(sd, tmp_path / "model.safetensors")
    for reader in READERS:
        with pytest.raises(UserError, match="--vae"):
            reader(file)
    wanted = sample_reads(sd)
    for vae in (sd, sd / "vae", sd / VAE):  # a pipeline, a folder, a file
        for reader in READERS:
            pipe = reader(file, vae=str(vae))
            for part in ("unet", "vae", "text_encoder"):
                ours, theirs = (getattr(p, part).state_dict() for p in (pipe, wanted))
                assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
            assert pipe.tokenizer("a red circle").input_ids == wanted.tokenizer("a red circle").input_ids


def test_a_single_file_with_all_its_parts_is_the_folder(sd, tmp_path, small_settings):
    file = checkpoint(sd, tmp_path / "model.safetensors", vae=True)
    wanted = sample_reads(sd)
    for reader in READERS:
        pipe = reader(file)
        for part in ("unet", "vae", "text_encoder"):
            ours, theirs = (getattr(p, part).state_dict() for p in (pipe, wanted))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), part
    alone = {name.removeprefix("first_stage_model."): t for name, t in load_file(file).items() if "first_stage" in name}
    save_file(alone, tmp_path / "vae.safetensors")
    for name in ("model", "vae"):  # a VAE may be given as a file of the original code, alone or in a checkpoint
        ours = sample_reads(sd, vae=str(tmp_path / f"{name}.safetensors")).vae.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.vae.state_dict().items())


def test_a_unet_in_one_file_takes_the_place_of_the_bases(sd, tmp_path):
    other = {name: tensor * 1.5 for name, tensor in load_file(sd / UNET).items()}
    save_file(other, tmp_path / "unet.safetensors", metadata={"format": "pt"})
    save_file({original(name): tensor for name, tensor in other.items()}, tmp_path / "original.safetensors")
    for name in ("unet", "original"):
        read = sample_reads(sd, unet=str(tmp_path / f"{name}.safetensors")).unet.state_dict()
        assert all(torch.equal(read[key], tensor) for key, tensor in other.items())


PREFIX = "model.diffusion_model."
SD3 = f"{PREFIX}joint_blocks.0.context_block.adaLN_modulation.1.bias"
FILES = {
    "a VAE": ({"decoder.conv_in.weight": (1,)}, "a VAE alone, not a base model; give it as --vae"),
    "anything": ({"x": (1,)}, "it holds no denoiser under model.diffusion_model"),
    "inpainting": ({f"{PREFIX}input_blocks.0.0.weight": (320, 9, 3, 3)}, "takes 9 channels, not 4: an inpainting"),
    "no text encoder": (
        {f"{PREFIX}input_blocks.0.0.weight": (320, 4, 3, 3)},
        "holds no text encoder, so it is no whole base; give it as --unet",
    ),
    "another kind": ({SD3: (9216,)}, "single file of kind|holds no text encoder"),
}


@pytest.mark.fault("A single file is a VAE, an inpainting model, or half a model", "Refused, with what it holds.")
@pytest.mark.parametrize("name", FILES)
def test_a_single_file_that_is_no_base_is_refused_by_what_it_holds(name, tmp_path):
    shapes, said = FILES[name]
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    with pytest.raises(UserError, match=said):
        sample_reads(file)


@pytest.mark.parametrize("option", ["vae", "unet"])
def test_a_part_that_is_not_there_is_one_line(option, sd, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    wanted = {"nowhere": "no such folder", str(tmp_path): "no config.json in that folder"}
    wanted |= {str(tmp_path / "x.safetensors"): f"holds no {option}", "x.ckpt": "a pickle can run code"}
    for name, said in wanted.items():
        with pytest.raises(UserError, match=f"--{option} .*{said}"):
            sample_reads(sd, **{option: name})


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("v1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("v2", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "xl_base",
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
    ],
)
def test_settings_of_a_kind_make_the_networks_that_were_published(kind, sizes, tmp_path):
    """By their number of parameters, and CLIP's tokens by those of a sentence that is known."""
    single_file_kinds.write_settings(tmp_path, kind)
    made = {}
    with torch.device("meta"):
        for name, kind_of in {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.items():
            made[name] = kind_of.from_config(kind_of.load_config(tmp_path, subfolder=name))
        for name, kind_of in {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}.items():
            if name in sizes:
                made[name] = kind_of(CLIPTextConfig.from_pretrained(tmp_path / name))
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in made.items()} == sizes
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
