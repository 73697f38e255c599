"""Files of other tools: each is used completely and at the right strength by everything that takes it, or refused."""

import copy
import json
import math
import re
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtune.config.sections import UserError
from sdtune.config.verbs import EvaluateConfig
from sdtune.evaluation.inputs import plan_of
from sdtune.models import attach
from sdtune.models.formats import AdapterFile, Embedding, Module, embedding, peft_settings, read, write
from sdtune.models.loading import load_adapters, load_embeddings
from sdtune.sampling.sample import generate
from tests.conftest import status
from tests.tinysd import save_tiny_sd, tiny_sd

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.out_proj"
FILES = ("diffusers", "kohya", "comfyui", "peft")
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def normal(*shape):
    return 0.3 * torch.randn(*shape)


def lora(out, inner, alpha=4.0, kernel=(), dora=False, rank=4):
    tensors = {"down": normal(rank, inner, *kernel), "up": normal(out, rank, *[1] * len(kernel))}
    return Module("lora", tensors, alpha, rank, torch.randn(out).abs() + 1 if dora else None)


def loha(out, inner, core=False):
    a, b = ((4, out), (4, inner)) if core else ((out, 4), (4, inner))
    tensors = {"w1_a": normal(*a), "w1_b": normal(*b), "w2_a": normal(*a), "w2_b": normal(*b)}
    return Module("loha", tensors | ({"t1": normal(4, 4, 3, 3), "t2": normal(4, 4, 3, 3)} if core else {}), 4.0, 4)


def lokr(first=("w1",), second=("w2_a", "w2_b"), rank=1):
    sides = {"w1": (4, 4), "w1_a": (4, rank), "w1_b": (rank, 4), "w2": (4, 4), "w2_a": (4, rank), "w2_b": (rank, 4)}
    return Module("lokr", {n: 4 * normal(*sides[n]) for n in (*first, *second)}, float(rank), rank)


KINDS = {
    "lora": lambda: {ATTENTION: lora(16, 16), "down_blocks.0.attentions.0.proj_in": lora(16, 16, 2.0, (1, 1))},
    "ranks": lambda: {ATTENTION: lora(16, 16), ATTENTION.replace("to_q", "to_k"): lora(16, 16, 8.0, rank=2)},
    "dora": lambda: {ATTENTION: lora(16, 16, dora=True), CONVOLUTION: lora(16, 16, 4.0, (3, 3), dora=True)},
    "locon": lambda: {CONVOLUTION: lora(16, 16, 2.0, (3, 3))},
    "loha": lambda: {ATTENTION: loha(16, 16), CONVOLUTION: loha(16, 16 * 9)},
    "loha core": lambda: {CONVOLUTION: loha(16, 16, core=True)},
    "lokr": lambda: {ATTENTION.replace("to_q", "to_v"): lokr()},
    "lokr both": lambda: {ATTENTION.replace("to_q", "to_v"): lokr(("w1_a", "w1_b"))},
    "lokr full": lambda: {ATTENTION.replace("to_q", "to_v"): lokr(("w1",), ("w2",), rank=4)},
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_sd(tmp_path_factory.mktemp("base") / "tiny-sd")


def drawn(pipe, adapters=(), embeddings=(), prompt="a red dog", negative=""):
    """The pixels of an image with these files loaded into a copy of the pipeline."""
    own = copy.deepcopy(pipe)
    load_adapters(own, list(map(str, adapters)))
    load_embeddings(own, list(map(str, embeddings)))
    options = {"steps": 2, "guidance_scale": 3.0, "negative_prompt": negative}
    (image,) = generate(own, [prompt], [5], **options)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


@pytest.fixture(scope="module")
def without(pipe):
    return drawn(pipe)


NOT_HELD = {("diffusers", kind) for kind in KINDS if kind.startswith(("loha", "lokr"))}
"""Formats that have no place for a kind: diffusers' own loader refuses them."""


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_in_every_format_draws_the_same_pixels(kind, pipe, without, tmp_path, capsys):
    torch.manual_seed(0)
    unet = KINDS[kind]()
    text = {TEXT: lora(32, 32, dora=kind == "dora")} if kind in ("lora", "ranks", "dora") else {}
    adapter = AdapterFile({"unet": unet} | ({"text_encoder": text} if text else {}))
    source = tmp_path / "source.safetensors"
    write(source, adapter, "kohya")
    images = {}
    for to in FILES:
        file = tmp_path / (to if to == "peft" else f"{to}.safetensors")
        ended = status(["convert", str(source), str(file), "--to", to])
        if (to, kind) in NOT_HELD:
            assert ended == 2 and f"--to {to}: cannot hold {kind[:4]}" in capsys.readouterr().err
            continue
        assert ended == 0
        images[to] = drawn(pipe, [file])
    assert all(torch.equal(image, images["kohya"]) for image in images.values())
    changed = copy.deepcopy(pipe)
    layers = attach.Layers(changed.components)
    with torch.no_grad():
        for key, module in attach.keyed(adapter).items():
            weight = layers.modules[key].weight
            weight.add_(module.delta(base=weight).float())
    truth = drawn(changed)
    assert (truth - without).abs().max() > 3
    for to, image in images.items():
        assert (image - truth).abs().max() <= 1, to
        assert torch.equal(image, images["kohya"]), to


def test_weight_scales_what_peft_cannot_hold(pipe, without, tmp_path):
    torch.manual_seed(0)
    write(tmp_path / "a.safetensors", AdapterFile({"unet": KINDS["loha"]()}), "kohya")
    assert torch.equal(drawn(pipe, [f"{tmp_path}/a.safetensors=0"]), without)
    half = drawn(pipe, [f"{tmp_path}/a.safetensors=0.5"])
    twice = drawn(pipe, [f"{tmp_path}/a.safetensors=0.25", f"{tmp_path}/a.safetensors=0.25"])
    assert (half - twice).abs().max() <= 1
    assert not torch.equal(half, without)


def test_keys_of_comfyui_and_eight_bit_floats(pipe, tmp_path):
    torch.manual_seed(0)
    down, up = normal(4, 16).to(torch.float8_e4m3fn), normal(16, 4).to(torch.float8_e4m3fn)
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "native.safetensors")
    save_file({f"{K}.lora_down.weight": down.half(), f"{K}.lora_up.weight": up.half()}, tmp_path / "kohya.safetensors")
    native, kohya = read(tmp_path / "native.safetensors"), read(tmp_path / "kohya.safetensors")
    assert native.format == "comfyui" and native.modules().keys() == kohya.modules().keys() == {f"unet.{ATTENTION}"}
    images = [drawn(pipe, [tmp_path / f"{name}.safetensors"]) for name in ("native", "kohya")]
    assert torch.equal(*images)


def test_evaluate_samples_from_an_adapter_of_another_tool(tmp_path):
    torch.manual_seed(0)
    write(tmp_path / "a.safetensors", AdapterFile({"unet": KINDS["loha"]()}), "kohya")
    write(tmp_path / "peft", AdapterFile({"unet": KINDS["lora"]()}), "peft")
    for name in ("a.safetensors", "peft"):
        cfg = EvaluateConfig(samples=str(tmp_path / name), reference="tiny-hearts", output_dir=tmp_path / "out")
        plan = plan_of(cfg)
        assert plan is not None and plan.sampling.adapter == [str(tmp_path / name)]


# ---- training from other tools' files -------------------------------------------------------------------


def trainable(pipe, rank=4, alpha=4.0, dora=False):
    from peft import LoraConfig

    unet = copy.deepcopy(pipe.unet)
    target = r"down_blocks\.0.*attn1\.to_q"
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=target, use_dora=dora))
    return unet


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("to", FILES)
def test_training_begins_with_the_effect_of_a_file_of_any_format(to, dora, pipe, tmp_path):
    torch.manual_seed(0)
    names = [n for n, _ in pipe.unet.named_modules() if n.startswith("down_blocks.0") and n.endswith("attn1.to_q")]
    adapter = AdapterFile({"unet": {name: lora(16, 16, alpha=8.0, dora=dora) for name in names}})
    file = tmp_path / ("peft" if to == "peft" else "a.safetensors")
    write(file, adapter, to)
    x = torch.randn(3, 16)
    for alpha in (4.0, 8.0):
        unet = trainable(pipe, alpha=alpha, dora=dora)
        attach.initialise(file, {"unet": unet})
        for name, module in adapter.parts["unet"].items():
            weight = dict(pipe.unet.named_modules())[name].weight.detach()
            changed = weight + module.delta(base=weight).float()
            torch.testing.assert_close(dict(unet.named_modules())[name](x), x @ changed.T, rtol=1e-4, atol=1e-5)


def test_training_begins_with_eight_bit_floats_and_not_with_words(pipe, tmp_path):
    torch.manual_seed(0)
    tensors = {f"{K}.lora_{end}.weight": normal(*shape) for end, shape in {"down": (4, 16), "up": (16, 4)}.items()}
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(eight, tmp_path / "eight.safetensors")
    unet = trainable(pipe)
    attach.initialise(tmp_path / "eight.safetensors", {"unet": unet})
    layer = dict(unet.named_modules())[ATTENTION]
    down, up = (eight[f"{K}.lora_{end}.weight"].float() for end in ("down", "up"))
    torch.testing.assert_close(layer.get_delta_weight("default"), up @ down)
    save_file(tensors | {"bundle_emb.zot.emb_params": torch.randn(2, 32)}, tmp_path / "words.safetensors")
    with pytest.raises(UserError, match=r"also holds the words zot, which it would lose; sdtune convert writes"):
        attach.initialise(tmp_path / "words.safetensors", {"unet": trainable(pipe)})


@pytest.mark.fault("An adapter has another kind, rank or module than what trains", "Refused, with what does not match.")
@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({ATTENTION: lambda: loha(16, 16)}, "holds loha, with which a LoRA cannot begin"),
        ({ATTENTION: lambda: lora(16, 16, rank=2)}, "0 of the 1 modules that train"),
        ({CONVOLUTION: lambda: lora(16, 16, kernel=(3, 3))}, "it lacks: unet.down_blocks"),
    ],
)
def test_a_file_that_training_cannot_begin_with_is_refused(parts, words, pipe, tmp_path):
    write(tmp_path / "a.safetensors", AdapterFile({"unet": {n: make() for n, make in parts.items()}}), "kohya")
    with pytest.raises(UserError, match=words):
        attach.initialise(tmp_path / "a.safetensors", {"unet": trainable(pipe)})


# ---- words ---------------------------------------------------------------------------------------------


def test_one_word_in_three_formats_draws_the_same_pixels(base, tmp_path, capsys):
    torch.manual_seed(0)
    embedding.write(
        tmp_path / "own.safetensors",
        Embedding("<toy>", {"text_encoder": torch.randn(2, 32)}, {}, "diffusers"),
        "diffusers",
    )
    for to in ("kohya", "comfyui"):
        words = ["convert", str(tmp_path / "own.safetensors"), str(tmp_path / f"{to}.safetensors"), "--to", to]
        assert status(words) == 0
    images = []
    for name in ("own", "kohya", "comfyui"):
        words = ["sample", "--model", str(base), "--embedding", str(tmp_path / f"{name}.safetensors"), "--steps", "1"]
        assert status([*words, "--prompt", "a <toy>", "--output-dir", str(tmp_path / name)]) == 0
        images.append(Image.open(tmp_path / name / "00000.png").tobytes())
    words = [
        "sample",
        "--model",
        str(base),
        "--steps",
        "1",
        "--prompt",
        "a <toy>",
        "--output-dir",
        str(tmp_path / "no"),
    ]
    assert status(words) == 0
    assert images[0] == images[1] == images[2] != Image.open(tmp_path / "no" / "00000.png").tobytes()


def test_a_file_without_a_name_in_it_is_called_by_its_own(pipe, tmp_path):
    torch.manual_seed(0)
    for name in ("MyStyle", "other"):
        save_file({"emb_params": torch.randn(3, 32)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "MyStyle.safetensors", tmp_path / "other.safetensors"]
    plain = drawn(pipe, prompt="a dog, MyStyle")
    assert not torch.equal(drawn(pipe, (), files, "a dog, MyStyle"), plain)
    assert not torch.equal(drawn(pipe, (), files, "a dog, other"), drawn(pipe, prompt="a dog, other"))
    negative = drawn(pipe, prompt="a dog", negative="MyStyle")
    assert not torch.equal(drawn(pipe, (), files, "a dog", "MyStyle"), negative)


def test_words_that_an_adapter_brings_along(pipe, tmp_path):
    torch.manual_seed(0)
    words = (Embedding("zot", {"text_encoder": torch.randn(2, 32)}, {}, "kohya"),)
    adapter = AdapterFile({"unet": KINDS["lora"]()}, words=words)
    write(tmp_path / "both.safetensors", adapter, "kohya")
    write(tmp_path / "alone.safetensors", AdapterFile(adapter.parts), "kohya")
    assert "bundle_emb.zot.emb_params" in load_file(tmp_path / "both.safetensors")
    both, alone = (drawn(pipe, [tmp_path / f"{n}.safetensors"], prompt="a zot") for n in ("both", "alone"))
    assert not torch.equal(both, alone)
    assert (
        status(["convert", str(tmp_path / "both.safetensors"), str(tmp_path / "d.safetensors"), "--to", "diffusers"])
        == 0
    )


BAD_WORDS = {
    "width": ({"emb_params": torch.zeros(2, 48)}, "its vectors are 48 wide, and those of the base's text_encoder 32"),
    "sdxl": ({"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(2, 32)}, "second text encoder, which is not"),
    "nan": ({"emb_params": torch.full((2, 32), math.nan)}, "64 numbers in 1 of its 1 tensors are NaN or infinite"),
    "integers": ({"emb_params": torch.zeros(2, 32, dtype=torch.int64)}, "is not a table of vectors"),
    "empty": ({"emb_params": torch.zeros(0, 32)}, "is not a table of vectors"),
    "cube": ({"emb_params": torch.zeros(2, 2, 32)}, "is not a table of vectors"),
    "long": ({"emb_params": torch.zeros(100, 32)}, "has 100 vectors"),
    "known": ({"dog</w>": torch.zeros(1, 32)}, "the base knows the word"),
    "escape": ({"\x1b[31mred": torch.zeros(1, 32)}, "unprintable ones"),
    "adapter": (
        {f"{K}.lora_down.weight": torch.ones(4, 16), f"{K}.lora_up.weight": torch.ones(16, 4)},
        "no learned word",
    ),
}


@pytest.mark.fault(
    "An embedding is damaged, or of another base", "Refused: numbers that are NaN are counted, widths are named."
)
@pytest.mark.parametrize("case", BAD_WORDS)
def test_embeddings_that_cannot_be_used_are_refused(case, pipe, tmp_path):
    tensors, words = BAD_WORDS[case]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words) as refused:
        load_embeddings(copy.deepcopy(pipe), [str(tmp_path / "a.safetensors")])
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


@pytest.mark.fault("Two embeddings teach the same word", "Refused, with both files.")
def test_two_files_with_one_word_are_refused(pipe, tmp_path):
    for name in ("a", "b"):
        save_file({"<x>": torch.ones(1, 32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"b.safetensors: its word is <x>, as that of .*a.safetensors"):
        load_embeddings(copy.deepcopy(pipe), [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")])


# ---- damage and hostile metadata ------------------------------------------------------------------------

GOOD = {f"unet.{ATTENTION}.lora.down.weight": (4, 16), f"unet.{ATTENTION}.lora.up.weight": (16, 4)}


def save(path, tensors=None, **config):
    about = {
        "lora_adapter_metadata": config.pop("text", None) or json.dumps({f"unet.{k}": v for k, v in config.items()})
    }
    save_file(tensors or {k: torch.ones(s) for k, s in GOOD.items()}, path, metadata=about)
    return path


@pytest.mark.fault("Modules are missing from an adapter", "Refused, with how many there are and the first that is not.")
def test_half_of_the_modules_missing_is_told(pipe, base, tmp_path, capsys):
    file = save(tmp_path / "a.safetensors", target_modules=["to_q", "to_k"])
    told = r"1 of the \d+ modules that its settings name in unet are in the file"
    with pytest.raises(UserError, match=told):
        load_adapters(copy.deepcopy(pipe), [str(file)])
    words = ["convert", str(file), str(tmp_path / "b.safetensors"), "--to", "kohya", "--model", str(base)]
    assert status(words) == 2
    assert re.search(told, capsys.readouterr().err) and not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("shapes", [((4, 24), (16, 4)), ((4, 16), (24, 4))], ids=["narrower", "wider"])
def test_a_module_of_another_shape_is_named(shapes, pipe, tmp_path):
    down, up = shapes
    save_file({f"{K}.lora_down.weight": normal(*down), f"{K}.lora_up.weight": normal(*up)}, tmp_path / "a.safetensors")
    told = rf"attn1.to_q is 16x16 in the base, {up[0]}x{down[1]} in the adapter"
    with pytest.raises(UserError, match=told):
        load_adapters(copy.deepcopy(pipe), [str(tmp_path / "a.safetensors")])


@pytest.mark.fault(
    "Metadata of an adapter holds nonsense, or patterns that take forever", "Refused in one line, in a moment."
)
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"alpha_pattern": {"(a+)+b|(.*)*x": 4}}, "too complex"),
        ({"alpha_pattern": {"(.*a){25}": 4}}, "too complex"),
        ({"alpha_pattern": {".*a" * 8: 4}}, "too complex"),
        ({"alpha_pattern": {"[a]" * 101: 4}}, "too complex"),
        ({"lora_alpha": 10**400}, "cannot be read"),
        ({"lora_alpha": "1" * 400}, "do not match"),
        ({"lora_alpha": "x"}, "do not match"),
        ({"r": -3}, "do not match"),
        ({"rank_pattern": [1]}, "cannot be read"),
        ({"text": "[" * 100_000}, "cannot be read .nested too deeply"),
        ({"text": "[1]"}, "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "sample"])
def test_settings_in_metadata_are_read_or_refused_in_a_moment(config, words, command, pipe, tmp_path, capsys):
    file = save(tmp_path / "a.safetensors", **config)
    began = time.process_time()
    if command == "inspect":
        assert status(["inspect", str(file)]) == 2
        message = capsys.readouterr().err.strip()
        assert re.search(words, message) and len(message.splitlines()) == 1 and len(message) < 1000
    else:
        with pytest.raises(UserError, match=words):
            load_adapters(pipe, [str(file)])
    assert time.process_time() - began < 5


def test_the_patterns_of_a_file_have_a_few_seconds_together(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_settings, "SECONDS", -1)
    read(save(tmp_path / "a.safetensors", alpha_pattern={"to_q": 4}))  # a plain name takes none of them
    with pytest.raises(UserError, match="its patterns take more than -1 seconds to match"):
        read(save(tmp_path / "a.safetensors", alpha_pattern={".*attn1.*": 4}))


def test_patterns_of_peft_still_count(tmp_path):
    for pattern in ("to_q", f"^{ATTENTION}$", r"down_blocks\.0\..*to_q", ".*attn1.*"):
        file = save(tmp_path / "a.safetensors", lora_alpha=4, r=4, alpha_pattern={"to_k": 1, pattern: 8})
        (module,) = read(file).modules().values()
        assert module.alpha == 8


def test_json_of_inspect_is_json(tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    record = '{"base": {"nested": [1]}, "learning_rate": NaN, "trigger": {"a": 1}, "seed": Infinity}'
    save_file(
        {k: torch.ones(s) for k, s in GOOD.items()}, file, metadata={"sdtune": record, "ss_tag_frequency": "[[1]]"}
    )
    assert status(["inspect", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["trained"]["learning_rate"] is None


@pytest.mark.fault("Metadata holds sequences that control a terminal", "They are printed as escapes.")
def test_metadata_cannot_control_the_terminal(tmp_path, capsys):
    record = json.dumps({"base": "\x1b]0;owned\x07base\u202e", "trigger": "a\x1b[2J\nfake line", "seed": 3})
    save_file({k: torch.ones(s) for k, s in GOOD.items()}, tmp_path / "a.safetensors", metadata={"sdtune": record})
    for words in (["inspect"], ["inspect", "--json"]):
        assert status([*words, str(tmp_path / "a.safetensors")]) == 0
        printed = capsys.readouterr().out
        assert not {"\x1b", "\x07", "\u202e"} & set(printed) and "\nfake line" not in printed
    assert status(["inspect", str(tmp_path / "\x1b[31m.safetensors")]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.fault("An adapter changes norms, biases or complete weights", "Refused, with what it changes.")
@pytest.mark.parametrize("end", ["diff", "diff_b", "w_norm"])
def test_changes_that_are_not_low_rank_are_named(end, tmp_path):
    save_file({f"{K}.{end}": torch.ones(16, 16)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="change norms, biases or complete weights"):
        read(tmp_path / "a.safetensors")


def test_modules_of_the_text_encoder_that_no_adapter_goes_on_are_named(pipe, tmp_path):
    modules = ["final_layer_norm", "embeddings_token_embedding", "encoder_layers_0_layer_norm1"]
    for module in ["text_projection", *(f"text_model_{name}" for name in modules)]:
        name = f"lora_te_{module}"
        ends = {f"{name}.lora_down.weight": torch.ones(4, 32), f"{name}.lora_up.weight": torch.ones(32, 4)}
        save_file(ends, tmp_path / "a.safetensors")
        with pytest.raises(
            UserError, match=r"0 of its 1 modules are layers of the base; it has no text_encoder\."
        ) as said:
            load_adapters(copy.deepcopy(pipe), [str(tmp_path / "a.safetensors")])
        assert "\n" not in str(said.value)


# ---- what other readers do not read ---------------------------------------------------------------------


def comfyui_change(weight, product, magnitude):
    """What ComfyUI makes of DoRA on rows: the changed weight by the norm of the base's rows."""
    norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    return (weight + product) * magnitude.reshape(norm.shape) / norm - weight


def test_dora_is_exact_in_comfyui_with_a_base(base, pipe, tmp_path, capsys):
    torch.manual_seed(0)
    adapter = AdapterFile({"unet": KINDS["dora"]()})
    write(tmp_path / "a.safetensors", adapter, "kohya")
    words = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "c.safetensors"), "--to", "comfyui"]
    assert status([*words, "--model", str(base)]) == 0
    assert "for ComfyUI alone" in capsys.readouterr().out
    magnitude = load_file(tmp_path / "c.safetensors")[f"{K}.dora_scale"].double()
    weight = dict(pipe.unet.named_modules())[ATTENTION].weight.detach().double()
    module = adapter.parts["unet"][ATTENTION]
    torch.testing.assert_close(comfyui_change(weight, module.product(), magnitude), module.delta(base=weight))
    assert torch.equal(drawn(pipe, [tmp_path / "a.safetensors"]), drawn(pipe, [tmp_path / "a.safetensors"]))
    assert (drawn(pipe, [tmp_path / "c.safetensors"]) - drawn(pipe, [tmp_path / "a.safetensors"])).abs().max() <= 1
    words = ["convert", str(tmp_path / "c.safetensors"), str(tmp_path / "k.safetensors"), "--to", "kohya"]
    assert status(words) == 2
    assert "made for ComfyUI alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        (lambda: {ATTENTION: lora(16, 16, dora=True)}, "ignores DoRA's magnitudes"),
        (lambda: {"conv_in": lora(16, 4, kernel=(3, 3))}, "ignores conv_in"),
        (lambda: {"time_embedding.linear_1": lora(64, 16)}, "ignores time_embedding"),
        (lambda: {ATTENTION: lora(16, 16)}, ""),
    ],
)
def test_convert_says_what_sd_scripts_ignores(unet, words, tmp_path, capsys):
    write(tmp_path / "a.safetensors", AdapterFile({"unet": unet()}), "kohya")
    assert status(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "kohya"]) == 0
    printed = capsys.readouterr().out
    assert words in printed and ("note:" in printed) is bool(words)
