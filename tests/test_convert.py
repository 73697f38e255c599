"""``sdtune convert`` and ``sdtune inspect``, through the command line."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import sdtune.conversion.convert
from sdtune.models.formats import AdapterFile, Module, read, write
from tests.conftest import command, status
from tests.test_lora import stock

NEW = {"diffusers": "new.safetensors", "kohya": "new.safetensors", "comfyui": "new.safetensors", "peft": "new"}
K = "lora_unet_mid_block_attentions_0_proj_in"


def left(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def train(sd, pictures, tmp_path_factory):
    def run(*options):
        out = tmp_path_factory.mktemp("runs") / "run"
        settings = ["--train-text-encoder", "--learning-rate", "3e-2", "--steps", "4", "--checkpointing-steps", "0"]
        assert status(command(sd, pictures, out, *settings, *options)) == 0
        return out

    return run


@pytest.fixture(scope="module")
def trained(train):
    return train("--rank", "4", "--alpha", "6")


def test_stock_diffusers_gives_the_same_image_of_every_file(trained, sd, tmp_path, capsys):
    """From a run to kohya, to PEFT, to ComfyUI and back to diffusers; each step checked in the base of the run."""
    want, plain = stock(sd, trained).astype(int), stock(sd).astype(int)
    at = trained
    for k, to in enumerate(("kohya", "peft", "comfyui", "diffusers")):
        new = tmp_path / (f"{k}" if to == "peft" else f"{k}.safetensors")
        assert status(["convert", str(at), str(new), "--to", to, "--model", str(sd)]) == 0
        told = capsys.readouterr().out
        assert f"{new}: {to}, lora of" in told
        assert f"the model's output as {'PEFT' if to == 'peft' else 'diffusers'} reads it" in told
        if to in ("kohya", "diffusers"):
            assert np.abs(stock(sd, new) - want).max() <= 1  # a factor in other weights moves a last bit
        at = new
    assert np.abs(plain - want).max() > 8
    assert {n.partition("/")[0] for n in left(tmp_path)} == {"0.safetensors", "1", "2.safetensors", "3.safetensors"}


def test_the_same_call_gives_the_same_bytes(trained, tmp_path):
    for name in ("a", "b"):
        assert status(["convert", str(trained), str(tmp_path / f"{name}.safetensors"), "--to", "kohya"]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_dora_of_both_parts_through_kohya(train, sd, tmp_path, capsys):
    run = train("--use-dora")
    for source, to, more in (
        (run, "comfyui", []),  # with its base the file would be exact in ComfyUI, and in it alone
        (tmp_path / "comfyui.safetensors", "diffusers", ["--model", str(sd)]),
    ):
        assert status(["convert", str(source), str(tmp_path / f"{to}.safetensors"), "--to", to, *more]) == 0
    assert "note: ComfyUI divides DoRA's rows" in capsys.readouterr().out
    assert np.abs(stock(sd, tmp_path / "diffusers.safetensors").astype(int) - stock(sd, run)).max() <= 1


def test_kohya_file_of_an_independent_writer_gives_base_plus_change(sd, tmp_path):
    """Keys spelt out; the expected model has the product added to its weight by hand."""
    torch.manual_seed(0)
    down, up, t_down, t_up = torch.randn(2, 16), torch.randn(16, 2), torch.randn(2, 32), torch.randn(32, 2)
    u = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    t = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    save_file(
        {
            f"{u}.lora_down.weight": down,
            f"{u}.lora_up.weight": up,
            f"{u}.alpha": torch.tensor(1.0),
            f"{t}.lora_down.weight": t_down,
            f"{t}.lora_up.weight": t_up,
            f"{t}.alpha": torch.tensor(1.0),
        },
        tmp_path / "theirs.safetensors",
    )
    out = tmp_path / "ours.safetensors"
    assert (
        status(["convert", str(tmp_path / "theirs.safetensors"), str(out), "--to", "diffusers", "--model", str(sd)])
        == 0
    )
    pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    with torch.no_grad():
        pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.weight += 0.5 * up @ down
        text = pipeline.text_encoder
        getattr(text, "text_model", text).encoder.layers[0].self_attn.out_proj.weight += 0.5 * t_up @ t_down
    pipeline.save_pretrained(tmp_path / "changed")
    assert np.abs(stock(tmp_path / "changed").astype(int) - stock(sd, out)).max() <= 1


@pytest.mark.parametrize(("to", "form"), [("kohya", "lokr"), ("peft", "lokr"), ("comfyui", "loha"), ("peft", "loha")])
def test_lycoris_is_checked_in_the_model(to, form, sd, tmp_path, capsys):
    torch.manual_seed(0)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    sides = {"lokr": {"w1": (4, 4), "w2_a": (4, 1), "w2_b": (1, 4)}}
    sides["loha"] = {"w1_a": (16, 1), "w1_b": (1, 16), "w2_a": (16, 1), "w2_b": (1, 16)}
    module = Module(form, {n: torch.randn(*s) for n, s in sides[form].items()}, 2.0, 1)
    write(tmp_path / "in.safetensors", AdapterFile({"unet": {name: module}}), "kohya")
    words = ["convert", str(tmp_path / "in.safetensors"), str(tmp_path / NEW[to]), "--to", to, "--model", str(sd)]
    assert status(words) == 0
    assert f"{form} of 1 modules; checked: the change of every module" in (told := capsys.readouterr().out)
    assert ("as PEFT reads it" if to == "peft" else "added to the weights") in told


def test_without_a_base_the_changes_are_compared(tmp_path, capsys):
    save_file(
        {f"{K}.lora_down.weight": torch.ones(2, 8), f"{K}.lora_up.weight": torch.ones(8, 2)}, tmp_path / "a.safetensors"
    )
    words = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]
    assert status(words) == 0
    assert "no base model at hand: give --model" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["scale", "module"])
def test_a_wrong_conversion_leaves_no_file(what, tmp_path, monkeypatch, capsys):
    save_file(
        {f"{K}.lora_down.weight": torch.ones(2, 8), f"{K}.lora_up.weight": torch.ones(8, 2)}, tmp_path / "a.safetensors"
    )

    def wrong(path, adapter, to):
        (name, module), *_ = adapter.parts["unet"].items()
        module = Module("lora", module.tensors, module.alpha * (2 if what == "scale" else 1), module.rank)
        write(path, AdapterFile({"unet": {name if what == "scale" else "conv_in": module}}), to)

    monkeypatch.setattr(sdtune.conversion.convert, "write", wrong)
    words = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "kohya"]
    assert status(words) == 1
    assert "was deleted" in capsys.readouterr().err
    assert left(tmp_path) == ["a.safetensors"]


REFUSED = {
    "IN: is required": [],
    "no such file": ["none.safetensors", "b.safetensors", "--to", "kohya"],
    "--to: is required": ["a.safetensors", "b.safetensors"],
    "did you mean kohya?": ["a.safetensors", "b.safetensors", "--to", "kohja"],
    "--too: no such option; did you mean --to?": ["a.safetensors", "b.safetensors", "--too", "kohya"],
    "exists already; give another name": ["a.safetensors", "a.safetensors", "--to", "kohya"],
    "--to kohya is a .safetensors file": ["a.safetensors", "b.bin", "--to", "kohya"],
    "--to peft is a folder": ["a.safetensors", "b.safetensors", "--to", "peft"],
    "there is no folder": ["a.safetensors", "c/b.safetensors", "--to", "kohya"],
    "a pickle, which can run code": ["a.ckpt", "b.safetensors", "--to", "kohya"],
    "2 of 3 keys make up": ["strange.safetensors", "b.safetensors", "--to", "diffusers"],
    "--to diffusers: cannot hold loha": ["loha.safetensors", "b.safetensors", "--to", "diffusers"],
    "not a safetensors file": ["zeros.safetensors", "b.safetensors", "--to", "kohya"],
    "0 of its 1 modules are layers of the base": ["far.safetensors", "b.safetensors", "--to", "kohya", "--model", "SD"],
}


@pytest.mark.parametrize("told", REFUSED)
def test_refusals_are_a_line_and_leave_nothing(told, sd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = {f"{K}.lora_down.weight": torch.ones(2, 8), f"{K}.lora_up.weight": torch.ones(8, 2)}
    save_file(good, "a.safetensors")
    save_file({**good, f"{K}.what": torch.ones(2)}, "strange.safetensors")
    save_file({f"{K}.hada_{n}": torch.ones(4, 4) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}, "loha.safetensors")
    save_file({k.replace("mid_block", "down_blocks_9"): v for k, v in good.items()}, "far.safetensors")
    (tmp_path / "zeros.safetensors").write_bytes(b"\0" * 64)
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x04.")
    before = left(tmp_path)
    assert status(["convert", *(str(sd) if word == "SD" else word for word in REFUSED[told])]) == 2
    shown = capsys.readouterr().err
    assert told in shown and shown.startswith("error: ")
    assert left(tmp_path) == before


# ---- textual inversion ---------------------------------------------------------------------------------


def test_textual_inversion_goes_round(sd, tmp_path, capsys):
    table = torch.randn(2, 32)
    save_file({"emb_params": table}, tmp_path / "sks-dog.safetensors")
    at = tmp_path / "sks-dog.safetensors"
    for to, key in (("diffusers", "<dog>"), ("comfyui", "clip_l"), ("kohya", "emb_params"), ("diffusers", "<dog>")):
        new = tmp_path / f"{to}-{at.stem}.safetensors"
        assert (
            status(["convert", str(at), str(new), "--to", to, *(["--token", "<dog>"] if at.stem == "sks-dog" else [])])
            == 0
        )
        assert "textual inversion <dog>; checked: all vectors" in capsys.readouterr().out
        tensors = load_file(new)
        assert list(tensors) == [key] and torch.equal(tensors[key], table)
        at = new
    pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    pipeline.load_textual_inversion(str(at))
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<dog>", "<dog>_1"])
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], table)


def test_textual_inversion_of_two_encoders_keeps_its_names(tmp_path, capsys):
    tables = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    save_file(tables, tmp_path / "sks.safetensors")
    words = ["convert", str(tmp_path / "sks.safetensors"), str(tmp_path / "new.safetensors"), "--to"]
    assert status([*words, "diffusers"]) == 0
    assert load_file(tmp_path / "new.safetensors").keys() == tables.keys()
    assert status([*words[:2], str(tmp_path / "folder"), "--to", "peft"]) == 2
    assert "cannot hold a textual inversion" in capsys.readouterr().err


# ---- inspect -------------------------------------------------------------------------------------------


def test_inspect_tells_what_a_file_is(trained, tmp_path, capsys):
    assert status(["inspect", str(trained), "--png", str(tmp_path / "norms.png")]) == 0
    told = capsys.readouterr().out
    for line in ("format      diffusers", "kind        lora", "rank        4", "alpha       6", "targets     k_proj"):
        assert line in told
    assert "unet.down_blocks.0" in told and "text_encoder.layers.0" in told and "█" in told
    assert Image.open(tmp_path / "norms.png").width == 720


def test_inspect_json_agrees_with_plain_arithmetic(trained, tmp_path, capsys):
    assert status(["inspect", str(trained), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    modules = read(trained).modules()
    squares = sum(float(m.delta().norm()) ** 2 for n, m in modules.items() if n.startswith("unet.mid_block"))
    assert facts["norms"]["unet.mid_block"] == pytest.approx(squares**0.5, rel=1e-4)
    tensors = load_file(trained / "pytorch_lora_weights.safetensors")
    assert facts["parameters"] == sum(t.numel() for t in tensors.values())
    assert facts["trained"]["seed"] == 0 and facts["base"]


def test_inspect_shows_the_words_that_trigger(tmp_path, capsys):
    about = {"ss_tag_frequency": json.dumps({"1_dog": {"sks": 9, "dog": 4}}), "ss_learning_rate": "0.0001"}
    tensors = {f"{K}.lora_down.weight": torch.zeros(2, 8), f"{K}.lora_up.weight": torch.zeros(8, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=about)
    assert status(["inspect", str(tmp_path / "a.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "sks, dog" in told and "learning_rate 0.0001" in told
    save_file({"<dog>": torch.ones(2, 32)}, tmp_path / "b.safetensors")
    assert status(["inspect", str(tmp_path / "b.safetensors")]) == 0
    assert "textual inversion" in capsys.readouterr().out
