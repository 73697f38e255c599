"""Adapter formats: every kind through every format that holds it, and files that other programs wrote."""

import itertools
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sdtune.config.sections import UserError
from sdtune.models.formats import AdapterFile, Module, read, write
from sdtune.models.formats.names import dotted, underscored
from tests.tinysd import tiny_sd

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.out_proj"
FILES = ("diffusers", "kohya", "comfyui", "peft")


def normal(*shape):
    return torch.randn(*shape)


def lora(out, inner, alpha, kernel=(), dora=False, rank=4):
    ones = [1] * len(kernel)
    tensors = {"down": normal(rank, inner, *kernel), "up": normal(out, rank, *ones)}
    return Module("lora", tensors, alpha, rank, normal(out).abs() + 1 if dora else None)


def loha(out, inner, alpha, core=False):
    a, b = ((4, out), (4, inner)) if core else ((out, 4), (4, inner))
    tensors = {"w1_a": normal(*a), "w1_b": normal(*b), "w2_a": normal(*a), "w2_b": normal(*b)}
    return Module("loha", tensors | ({"t1": normal(4, 4, 3, 3), "t2": normal(4, 4, 3, 3)} if core else {}), alpha, 4)


def lokr(alpha, rank=4, first=("w1",), second=("w2_a", "w2_b")):
    sides = {"w1": (4, 4), "w1_a": (4, rank), "w1_b": (rank, 4), "w2": (16, 16), "w2_a": (16, rank), "w2_b": (rank, 16)}
    return Module("lokr", {n: normal(*sides[n]) for n in (*first, *second)}, alpha, rank)


KINDS = {
    "lora": lambda a: {ATTENTION: lora(16, 16, a), "mid_block.attentions.0.proj_in": lora(8, 8, a, (1, 1))},
    "ranks": lambda a: {ATTENTION: lora(16, 16, a), ATTENTION.replace("to_q", "to_k"): lora(16, 16, 2 * a, rank=2)},
    "dora": lambda a: {ATTENTION: lora(16, 16, a, dora=True), CONVOLUTION: lora(16, 8, a, (3, 3), dora=True)},
    "locon": lambda a: {CONVOLUTION: lora(16, 8, a, (3, 3))},
    "loha": lambda a: {ATTENTION: loha(16, 16, a), CONVOLUTION: loha(16, 8 * 9, a)},
    "loha core": lambda a: {CONVOLUTION: loha(16, 8, a, core=True)},
    "lokr": lambda a: {ATTENTION: lokr(a)},
    "lokr both": lambda a: {ATTENTION: lokr(a, 1, ("w1_a", "w1_b"))},
    "lokr full": lambda a: {ATTENTION: lokr(a, 4, ("w1",), ("w2",))},
}
MATRIX = list(itertools.product(KINDS, FILES, FILES, (False, True), (4, 6)))


@pytest.mark.parametrize(("kind", "first", "second", "text", "alpha"), MATRIX)
def test_every_change_survives_two_formats(kind, first, second, text, alpha, tmp_path):
    torch.manual_seed(0)
    unet = KINDS[kind](float(alpha))
    adapter = AdapterFile({"unet": unet} | ({"text_encoder": {TEXT: next(iter(unet.values()))}} if text else {}))
    there = adapter
    for step, form in enumerate((first, second)):
        path = tmp_path / (f"{step}" if form == "peft" else f"{step}.safetensors")
        if form == "diffusers" and kind.startswith(("loha", "lokr")):
            with pytest.raises(UserError, match=r"--to diffusers: cannot hold lo.*; kohya, comfyui and peft can"):
                write(path, there, form)
            return
        write(path, there, form)
        there = read(path)
        assert there.format == ("kohya" if form == "comfyui" else form)
    want, got = adapter.modules(), there.modules()
    assert want.keys() == got.keys()
    for name, module in want.items():
        base = torch.randn(module.shape)
        torch.testing.assert_close(got[name].delta(base=base), module.delta(base=base), rtol=1e-5, atol=1e-6)


def test_kohya_file_of_an_independent_writer(tmp_path):
    """Keys as sd-scripts writes them for Stable Diffusion 1, spelt out; the change by plain arithmetic."""
    torch.manual_seed(0)
    q_down, q_up, c_down, c_up, t_down, t_up = (
        *(normal(2, 16), normal(16, 2)),
        *(normal(3, 16, 3, 3), normal(16, 3, 1, 1)),
        *(normal(2, 32), normal(32, 2)),
    )
    norm = normal(16).abs()
    save_file(
        {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight": q_down,
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight": q_up,
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha": torch.tensor(1.0),
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.dora_scale": norm.reshape(16, 1),
            "lora_unet_down_blocks_0_resnets_0_conv2.lora_down.weight": c_down,
            "lora_unet_down_blocks_0_resnets_0_conv2.lora_up.weight": c_up,
            "lora_unet_down_blocks_0_resnets_0_conv2.alpha": torch.tensor(6.0),
            "lora_te_text_model_encoder_layers_1_mlp_fc2.lora_down.weight": t_down,
            "lora_te_text_model_encoder_layers_1_mlp_fc2.lora_up.weight": t_up,
        },
        tmp_path / "theirs.safetensors",
        metadata={"ss_network_module": "networks.lora"},
    )
    adapter = read(tmp_path / "theirs.safetensors")
    unet = adapter.parts["unet"]
    convolution = unet["down_blocks.0.resnets.0.conv2"].delta()
    expected = 2.0 * torch.nn.functional.conv2d(c_down.transpose(0, 1), c_up).transpose(0, 1)
    torch.testing.assert_close(convolution.float(), expected, rtol=1e-4, atol=1e-5)
    text = adapter.parts["text_encoder"]["text_model.encoder.layers.1.mlp.fc2"].delta()
    torch.testing.assert_close(text.float(), t_up @ t_down)  # no alpha: scale 1
    base = normal(16, 16)
    changed = base + 0.5 * q_up @ q_down
    changed = changed / changed.norm(dim=1, keepdim=True) * norm.reshape(16, 1)
    dora = unet["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"].delta(base=base)
    torch.testing.assert_close((base + dora).float(), changed)


def test_core_of_a_locon_is_the_same_convolution(tmp_path):
    torch.manual_seed(0)
    down, mid, up = normal(3, 8, 1, 1), normal(3, 3, 3, 3), normal(16, 3, 1, 1)
    keys = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    save_file({f"lora_unet_conv_in.{k}": v for k, v in keys.items()}, tmp_path / "a.safetensors")
    x = normal(1, 8, 6, 6)
    steps = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1), up)
    whole = read(tmp_path / "a.safetensors").parts["unet"]["conv_in"].delta().float()
    torch.testing.assert_close(nn.functional.conv2d(x, whole, padding=1), steps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("alpha", [4, 6])
def test_file_that_diffusers_wrote(text, alpha, tmp_path):
    torch.manual_seed(0)
    pipe = tiny_sd()
    models = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if text else {})
    for model in models.values():
        targets = ["to_k", "to_out.0", "conv1"] if model is pipe.unet else ["q_proj", "v_proj"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = {
        f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        for part, model in models.items()
    }
    configs = {
        f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict() for part, model in models.items()
    }
    pipe.save_lora_weights(tmp_path, **layers, **configs)
    parts = read(tmp_path).parts
    assert parts.keys() == models.keys()
    for part, model in models.items():
        compare_with_peft(model, parts[part])


def compare_with_peft(model, modules):
    theirs = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(theirs) == len(modules)
    for name, layer in theirs.items():
        name = name.removeprefix("base_model.model.")
        module = modules.get(name) or modules[f"text_model.{name}"]
        want = layer.get_delta_weight("default")
        torch.testing.assert_close(module.delta(want.shape).float(), want, rtol=1e-4, atol=1e-5)


PEFT_KINDS = {
    "patterns": lambda t: LoraConfig(r=4, lora_alpha=6, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 3}, **t),
    "rslora": lambda t: LoraConfig(r=4, lora_alpha=6, use_rslora=True, **t),
    "loha": lambda t: LoHaConfig(r=4, alpha=6, **t),
    "loha core": lambda t: LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, **t),
    "lokr": lambda t: LoKrConfig(r=2, alpha=6, **t),
    "lokr both": lambda t: LoKrConfig(r=1, alpha=6, decompose_both=True, decompose_factor=4, **t),
    "lokr core": lambda t: LoKrConfig(r=1, alpha=6, decompose_factor=2, use_effective_conv2d=True, **t),
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_folder_that_peft_wrote_and_that_it_reads_again(kind, tmp_path):
    torch.manual_seed(0)
    targets = {"target_modules": ["to_q", "to_k", "conv1", "ff.net.0.proj"]}
    model = get_peft_model(tiny_sd().unet, PEFT_KINDS[kind](targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "theirs" / "unet")
    adapter = read(tmp_path / "theirs")
    compare_with_peft(model, adapter.parts["unet"])
    write(tmp_path / "kohya.safetensors", adapter, "kohya")
    write(tmp_path / "ours", read(tmp_path / "kohya.safetensors"), "peft")
    again = PeftModel.from_pretrained(tiny_sd().unet, tmp_path / "ours", subfolder="unet")
    compare_with_peft(again, adapter.parts["unet"])


def test_peft_reads_the_text_encoder(tmp_path):
    torch.manual_seed(0)
    adapter = AdapterFile({"text_encoder": {TEXT: lora(32, 32, 8.0, dora=True)}})
    write(tmp_path / "out", adapter, "peft")
    model = PeftModel.from_pretrained(tiny_sd().text_encoder, tmp_path / "out", subfolder="text_encoder")
    (layer,) = (m for m in model.modules() if hasattr(m, "get_delta_weight"))
    (module,) = adapter.parts["text_encoder"].values()
    torch.testing.assert_close(layer.get_delta_weight("default"), module.product().float())
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, module.magnitude)


def test_keys_of_2023(tmp_path):
    down, up = normal(4, 16), normal(16, 4)
    stems = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora": "attn1.to_out.0",
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora": "attn2.to_q",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_k_lora": "self_attn.k_proj",
        "text_encoder.encoder.layers.1.self_attn.v_proj.lora_linear_layer": "layers.1.self_attn.v_proj",
    }
    save_file(
        {f"{s}.{e}.weight": t.clone() for s in stems for e, t in (("down", down), ("up", up))},
        tmp_path / "a.safetensors",
    )
    modules = read(tmp_path / "a.safetensors").modules()
    assert len(modules) == len(stems)
    for end in stems.values():
        (name,) = (n for n in modules if n.endswith(end))
        assert "text_model." in name or name.startswith("unet.")
        torch.testing.assert_close(modules[name].delta().float(), up @ down)


# ---- names ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl():
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )


def test_dots_of_every_module_of_sdxl_come_back(sdxl):
    names = [n for n, m in sdxl.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(names) == 794
    assert [n for n in names if dotted(underscored(n)) != n] == []


def test_sgm_names_are_those_of_diffusers_own_map(sdxl):
    ends = {
        "0": ["in_layers_2", "out_layers_3", "emb_layers_1", "skip_connection"],
        "1": ["proj_in", "transformer_blocks_1_attn2_to_k", "transformer_blocks_0_ff_net_0_proj"],
    }
    names = [f"input_blocks_{i}_{j}_{e}" for i in (1, 2, 4, 5, 7, 8) for j in "01" for e in ends[j]]
    names += [f"output_blocks_{i}_{j}_{e}" for i in range(9) for j in "01" for e in ends[j]]
    names += [f"middle_block_{i}_{e}" for i in "012" for e in ends[str(int(i) % 2)]]
    names += ["input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"]
    state = {f"lora_unet_{name}.lora_down.weight": torch.tensor(float(k)) for k, name in enumerate(names)}
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(state), sdxl.config)
    blocks = str.maketrans({" ": "."})
    for key, value in mapped.items():
        theirs = key.removeprefix("lora_unet_").removesuffix(".lora_down.weight")
        theirs = theirs.replace("input_blocks", "down_blocks").replace("output_blocks", "up_blocks")
        theirs = theirs.replace("middle_block", "mid_block").replace("in_layers_2", "conv1")
        theirs = theirs.replace("out_layers_3", "conv2").replace("emb_layers_1", "time_emb_proj")
        theirs = theirs.replace("skip_connection", "conv_shortcut")
        if theirs.endswith("_op"):
            theirs = theirs.removesuffix("op") + "conv"
        assert underscored(dotted(names[int(value)]).translate(blocks)) == theirs
    known = {n for n, m in sdxl.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    alone = ["input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"]
    assert {dotted(n) for n in alone} <= known


# ---- bytes and refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FILES)
def test_same_content_same_bytes(form, tmp_path):
    torch.manual_seed(0)
    modules = KINDS["lora"](4.0)
    told = {"sdtune": json.dumps({"base": "b", "seed": 3}), "ss_output_name": "x", "ss_tag_frequency": "{}"}
    for turn, name in ((1, "one"), (-1, "two")):
        parts = {"unet": dict(list(modules.items())[::turn]), "text_encoder": {TEXT: lora(32, 32, 4.0)}}
        torch.manual_seed(1)
        parts["text_encoder"] = {TEXT: lora(32, 32, 4.0)}
        adapter = AdapterFile(dict(list(parts.items())[::turn]), dict(list(told.items())[::turn]))
        write(tmp_path / (name if form == "peft" else f"{name}.safetensors"), adapter, form)
    one, two = (
        [f.read_bytes() for f in sorted((tmp_path / n).rglob("*.*") or [])]
        if form == "peft"
        else [(tmp_path / f"{n}.safetensors").read_bytes()]
        for n in ("one", "two")
    )
    assert one == two


def test_provenance_fills_the_metadata_of_kohya(tmp_path):
    torch.manual_seed(0)
    told = {"sdtune": json.dumps({"base": "user/sd", "seed": 3}), "lora_adapter_metadata": "{}", "ss_epoch": "7"}
    write(tmp_path / "a.safetensors", AdapterFile({"unet": KINDS["lora"](6.0)}, told), "kohya")
    about = read(tmp_path / "a.safetensors").metadata
    wanted = {"ss_sd_model_name": "user/sd", "ss_seed": "3", "ss_epoch": "7", "ss_network_dim": "4", "ss_v2": "False"}
    wanted |= {"ss_network_alpha": "6", "ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1"}
    assert wanted.items() <= about.items()
    assert about["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert "lora_adapter_metadata" not in about


def test_sdxl_has_two_text_encoders(tmp_path):
    torch.manual_seed(0)
    parts = {
        "unet": KINDS["lora"](4.0),
        "text_encoder": {TEXT: lora(8, 8, 4.0)},
        "text_encoder_2": {TEXT: lora(8, 8, 4.0)},
    }
    write(tmp_path / "a.safetensors", AdapterFile(parts), "kohya")
    starts = {key[:9] for key in load_file(tmp_path / "a.safetensors")}
    assert starts == {"lora_unet", "lora_te1_", "lora_te2_"}
    assert read(tmp_path / "a.safetensors").metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert read(tmp_path / "a.safetensors").parts.keys() == parts.keys()


K = "lora_unet_mid_block_attentions_0_proj_in"
GOOD = {f"{K}.lora_down.weight": (4, 8), f"{K}.lora_up.weight": (8, 4)}
BAD = {
    "half": ({f"{K}.lora_down.weight": (4, 8)}, "0 of 1 keys make up an adapter; these do not: lora_unet_mid_block"),
    "strange": (
        GOOD | {"lora_unet_mid_blob.alpha": ()},
        "2 of 3 keys make up an adapter; these do not: lora_unet_mid_blob.alpha",
    ),
    "mixed": (GOOD | {"unet.conv_in.lora_A.weight": (4, 4)}, "2 of 3 keys"),
    "shapes": (GOOD | {f"{K}.lora_up.weight": (8, 3)}, "do not match"),
    "model": ({"conv_in.weight": (4, 4, 3, 3)}, "0 of 1 keys make up an adapter; these do not: conv_in.weight"),
    "peft alone": ({"base_model.model.conv_in.lora_A.weight": (4, 4)}, "need their adapter_config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_adapter_is_refused(case, tmp_path):
    shapes, told = BAD[case]
    save_file({k: torch.ones(s) for k, s in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"^.*$") as refused:
        read(tmp_path / "a.safetensors")
    assert told in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value, tmp_path):
    save_file({k: torch.full(s, value) for k, s in GOOD.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="are NaN or infinite"):
        read(tmp_path / "a.safetensors")


def test_norms_of_columns_go_where_they_can(tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"{K}.lora_down.weight": normal(4, 8),
        f"{K}.lora_up.weight": normal(16, 4),
        f"{K}.dora_scale": normal(1, 8),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read(tmp_path / "a.safetensors")
    write(tmp_path / "b.safetensors", adapter, "kohya")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{K}.dora_scale"], tensors[f"{K}.dora_scale"])
    for form in ("diffusers", "peft"):
        with pytest.raises(UserError, match="norms of columns"):
            write(tmp_path / "c", adapter, form)
