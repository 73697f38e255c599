"""``sdtune merge``: every sum, rank and difference against one computed here from the files' own tensors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig
from peft import LoraConfig as PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdtune.config.sections import RunFailed, UserError
from sdtune.config.verbs import MergeConfig
from sdtune.conversion.lowrank import decompose, decompose_product
from sdtune.conversion.merge import merge
from tests.conftest import status
from tests.tinysd import tiny_sd

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters are the point

torch.set_num_threads(1)  # models this small are several times slower on two
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LOCON = ["attn1.to_q", "conv1", "proj_in", "conv_in", "downsamplers.0.conv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters with updates large enough to see: two LoRAs, one with convolutions and text encoder, DoRA and LoHa."""
    folder = tmp_path_factory.mktemp("adapters")
    write(folder / "a.safetensors", 1, 4, 8, ATTENTION)
    write(folder / "b.safetensors", 2, 3, 3, LOCON, text=True)
    write(folder / "dora.safetensors", 3, 2, 2, ["to_q", "conv2"], use_dora=True)
    pipe = tiny_sd()
    pipe.unet.add_adapter(LoHaConfig(r=2, alpha=2, target_modules=["to_q", "conv2"]), "default")
    tensors = {}
    for name, module in pipe.unet.named_modules():
        if hasattr(module, "hada_w1_a"):
            stem = f"lora_unet_{name.replace('.', '_')}"
            for end in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
                tensors[f"{stem}.{end}"] = 0.5 * noise(len(tensors), getattr(module, end)["default"].shape)
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, folder / "loha.safetensors")
    return folder


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(path: Path, seed: int, rank: int, alpha: float, targets: list[str], text: bool = False, **more):
    """An adapter that stock diffusers writes."""
    pipe, layers = tiny_sd(), {}
    parts = {"unet": (pipe.unet, targets)} | ({"text_encoder": (pipe.text_encoder, ["q_proj", "fc1"])} if text else {})
    about = {}
    for part, (model, names) in parts.items():
        model.add_adapter(PeftConfig(r=rank, lora_alpha=alpha, target_modules=names, **more))
        own = {n: p for n, p in model.named_parameters() if "lora_" in n}
        for k, (name, p) in enumerate(own.items()):
            p.data = 0.2 * noise(100 * seed + k, p.shape) if "magnitude" not in name else p.data * 1.1
        layers[f"{part}_lora_layers"] = {n.replace(".default", ""): p for n, p in own.items()}
        about[f"{part}_lora_adapter_metadata"] = {"r": rank, "lora_alpha": alpha, "target_modules": names, **more}
    StableDiffusionPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers, **about)


def changes(file: Path, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """``alpha / r * up @ down`` of each module in float64, by PEFT's names, from the tensors of the file."""
    with safe_open(file, framework="pt") as opened:
        config = json.loads((opened.metadata() or {})["lora_adapter_metadata"])
    tensors = {k: v.double() for k, v in load_file(file).items()}
    found = {}
    for key, up in tensors.items():
        for one, other in ((".lora_B.", ".lora_A."), (".lora.up.", ".lora.down."), ("layer.up.", "layer.down.")):
            if one in key:
                down, name = tensors[key.replace(one, other)], key.partition(".lora")[0].replace("text_model.", "")
                part, _, inner = name.partition(".")
                rank = config.get(f"{part}.rank_pattern", {}).get(inner, config[f"{part}.r"])
                alpha = config.get(f"{part}.alpha_pattern", {}).get(inner, config[f"{part}.lora_alpha"])
                assert rank == len(down)
                found[name] = weight * alpha / rank * (up.flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:])
    return found


def summed(*all_of_them):
    total = {}
    for found in all_of_them:
        for name, delta in found.items():
            total[name] = total[name] + delta if name in total else delta
    return total


def applied(file: Path) -> dict[str, torch.Tensor]:
    """The change that stock diffusers applies to each layer; with the metadata it was given."""
    pipe = tiny_sd()
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return {
        f"{part}.{name}": next(m.get_delta_weight(k) for k in m.lora_A).detach().double()
        for part in ("unet", "text_encoder")
        for name, m in getattr(pipe, part).named_modules()
        if hasattr(m, "get_delta_weight")
    }


def same(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    worst = max(float((one[k] - other[k]).norm() / other[k].norm()) for k in other)
    assert worst < tolerance, worst


def image(base, *adapters):
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for k, (file, _) in enumerate(adapters):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"a{k}")
    if adapters:
        pipe.set_adapters([f"a{k}" for k in range(len(adapters))], [weight for _, weight in adapters])
    made = pipe("a dog", num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(3), output_type="np")
    return made.images[0]


def rms(one, other):
    return float(np.sqrt(np.mean((one - other) ** 2)))


def energies(lines):
    return {line.partition(":")[0]: float(line.split("energy ")[1].split()[0]) for line in lines if "energy" in line}


# ---- mathematics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 30])  # factored, and as a full matrix
def test_singular_values_of_a_product_are_those_of_the_matrix(rank):
    up, down = noise(1, (20, rank)), noise(2, (rank, 24))
    matrix = up.double() @ down.double()
    found = decompose_product(up, down)
    s = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(found.s[: len(s)], s[: len(found.s)], rtol=1e-10, atol=1e-10)
    for kept in (1, 2, 3):
        a, b = found.factors(kept)
        assert float((matrix - a @ b).square().sum()) == pytest.approx(float(s[kept:].square().sum()), abs=1e-9)
        assert found.energy(kept) == pytest.approx(float(s[:kept].square().sum()))


@pytest.mark.parametrize("shape", [(8, 40), (8, 4, 3, 3), (40, 8), (8, 8)])
def test_a_wide_matrix_is_decomposed_like_any_other(shape):
    matrix = noise(1, shape).double().flatten(1)
    found = decompose(noise(1, shape))
    torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(found.u * found.s @ found.vh, matrix)


def test_ranks_by_energy():
    spectrum = decompose(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])))  # squares 9, 4, 1 of 14
    assert [spectrum.rank(energy=e) for e in (0.1, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert (spectrum.rank(2), spectrum.rank(2, 1.0), spectrum.rank(9)) == (2, 2, 3)
    assert decompose(torch.zeros(3, 4)).rank(2) == 0


# ---- adapters into one -----------------------------------------------------------------------------------------


def test_concatenation_is_the_sum(folder, tmp_path):
    a, b, out = folder / "a.safetensors", folder / "b.safetensors", tmp_path / "sub" / "ab.safetensors"
    assert status(["merge", "--adapter", f"{a}=0.8", f"{b}=-0.5", "--output", str(out)]) == 0
    want = summed(changes(a, 0.8), changes(b, -0.5))
    same(changes(out), want)
    same(applied(out), want)
    with safe_open(out, framework="pt") as file:
        about = file.metadata()
    config, told = json.loads(about["lora_adapter_metadata"]), json.loads(about["sdtune"])
    assert {4, 7} <= {config["unet.r"], *config["unet.rank_pattern"].values()}
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"]
    assert [(x["name"], x["weight"]) for x in told["merged"]["adapters"]] == [(a.name, 0.8), (b.name, -0.5)]
    assert str(tmp_path.parent) not in json.dumps(about)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_readers_that_know_no_metadata_scale_it_rightly(folder, tmp_path):
    a, b, out = folder / "a.safetensors", folder / "b.safetensors", tmp_path / "ab.safetensors"
    merge(MergeConfig(adapter=[str(a), str(b)], output=out))
    save_file(load_file(out), tmp_path / "bare.safetensors", metadata={"format": "pt"})
    same(applied(tmp_path / "bare.safetensors"), summed(changes(a), changes(b)))


def test_files_of_others_with_an_alpha_for_each_module(folder, tmp_path):
    """kohya's keys, spelt out, and PEFT's folder, which diffusers itself reads wrongly or not at all."""
    stem, name = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "mid_block.attentions.0.proj_in"
    down, up = noise(1, (2, 32)), noise(2, (32, 2))
    kohya = {f"lora_unet_{stem}.lora_down.weight": down, f"lora_unet_{stem}.lora_up.weight": up}
    save_file(kohya | {f"lora_unet_{stem}.alpha": torch.tensor(0.5)}, tmp_path / "k.safetensors")
    (tmp_path / "peft").mkdir()
    keys = {f"base_model.model.{name}.lora_A.weight": down[:, :, None, None]}
    keys |= {f"base_model.model.{name}.lora_B.weight": up[:, :, None, None]}
    save_file(keys, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["proj_in"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "out.safetensors"
    merge(MergeConfig(adapter=[str(tmp_path / "k.safetensors"), f"{tmp_path / 'peft'}=0.5"], output=out))
    product = up.double() @ down.double()
    linear = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    same(applied(out), {linear: 0.25 * product, f"unet.{name}": 1.5 * product[:, :, None, None]})


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    for name in ("one", "other"):
        words = {"combine": "svd", "rank": 2, "dtype": "fp16", "output": tmp_path / f"{name}.safetensors"}
        merge(MergeConfig(adapter=[str(folder / "a.safetensors"), str(folder / "b.safetensors")], **words))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert {t.dtype for t in load_file(tmp_path / "one.safetensors").values()} == {torch.float16}


def test_svd_leaves_out_the_tail_of_the_singular_values(folder, tmp_path, capsys):
    a, b, out = folder / "a.safetensors", folder / "b.safetensors", tmp_path / "ab.safetensors"
    words = ["--method", "svd", "--rank", "2", "--output", str(out)]
    assert status(["merge", "--adapter", f"{a}=0.7", str(b), *words]) == 0
    want, got = summed(changes(a, 0.7), changes(b)), applied(out)
    assert got.keys() == want.keys()
    kept, total = {"unet": 0.0, "text_encoder": 0.0}, {"unet": 0.0, "text_encoder": 0.0}
    for name, delta in want.items():
        squares = torch.linalg.svdvals(delta.flatten(1)).square()
        error = float((got[name] - delta).square().sum())
        assert error == pytest.approx(float(squares[2:].sum()), rel=1e-4, abs=1e-9)
        part = name.partition(".")[0]
        kept[part] += float(squares[:2].sum())
        total[part] += float(squares.sum())
    told = energies(capsys.readouterr().out.splitlines())
    for part in kept:
        assert told[part] == pytest.approx(kept[part] / total[part], abs=2e-6)


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_other_kinds_go_through_their_change_of_the_base(kind, folder, sd, tmp_path):
    a, other, out = folder / "a.safetensors", folder / f"{kind}.safetensors", tmp_path / "out.safetensors"
    for words in ({}, {"combine": "svd", "rank": 8}):
        with pytest.raises(UserError, match=f"{other.name}.*{kind}.*--model BASE"):
            merge(MergeConfig(adapter=[str(a), str(other)], output=out, **words))
    words = {"combine": "svd", "energy": 1.0, "model": str(sd)}
    merge(MergeConfig(adapter=[f"{a}=0.5", f"{other}=0.6"], output=out, **words))
    merge(MergeConfig(adapter=[f"{a}=0.5", f"{other}=0.6"], output_dir=tmp_path / "model", model=str(sd)))
    assert rms(image(sd, (out, 1.0)), image(tmp_path / "model")) < 1e-4
    assert rms(image(sd), image(tmp_path / "model")) > 1e-2


# ---- into a base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["b", "dora"])
def test_the_merged_pipeline_is_base_and_adapters(second, folder, sd, tmp_path, capsys):
    a, b, out = folder / "a.safetensors", folder / f"{second}.safetensors", tmp_path / "model"
    words = ["merge", "--model", str(sd), "--adapter", f"{a}=0.8", f"{b}=0.5", "--output-dir", str(out)]
    assert status(words) == 0
    assert "its image equals that of base and adapters" in capsys.readouterr().out
    wanted = image(sd, (a, 0.8), (b, 0.5))
    assert rms(image(out), wanted) < 1e-4 < 1e-2 < rms(image(sd), wanted)
    assert json.loads((out / "merge.json").read_text())["merged"]["adapters"][1]["weight"] == 0.5
    assert not [f for f in out.rglob("*.json") if str(sd.parent) in f.read_text()]
    assert status(words) == 2
    assert "exists already; give another name or add --overwrite" in capsys.readouterr().err
    if second == "b":
        assert status([*words, "--overwrite", "--dtype", "fp16"]) == 0
        assert {t.dtype for t in load_file(out / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
            torch.float16
        }
        assert rms(image(out), wanted) < 1e-2
        names = load_file(out / "text_encoder" / "model.safetensors")
        assert all(k.startswith("text_model.") for k in names), "as published"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---- two models into an adapter --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(sd, tmp_path_factory):
    """The base with a change of rank 3 in a linear layer, a convolution and the text encoder, and one norm moved."""
    pipe = StableDiffusionPipeline.from_pretrained(sd)
    where = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": None,
        "unet.down_blocks.0.resnets.0.conv1": None,
        "text_encoder.encoder.layers.1.mlp.fc2": None,
    }
    with torch.no_grad():
        for k, name in enumerate(where):
            part, _, inner = name.partition(".")
            weight = getattr(pipe, part).get_submodule(inner).weight
            flat = weight.flatten(1)
            where[name] = (noise(k, (len(flat), 3)) @ noise(k + 9, (3, flat.shape[1]))).reshape(weight.shape) * 0.3
            weight += where[name]
        pipe.unet.conv_norm_out.weight += 0.1
    folder = tmp_path_factory.mktemp("tuned") / "model"
    pipe.save_pretrained(folder)
    return folder, {k: v.double() for k, v in where.items()}


def test_extract_recovers_a_low_rank_change(tuned, sd, tmp_path, capsys):
    model, want = tuned
    out = tmp_path / "diff.safetensors"
    words = ["merge", "--extract", "--model", str(sd), "--tuned", str(model), "--output", str(out)]
    assert status([*words, "--rank", "3"]) == 0
    same(applied(out), want, 1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert energies(lines) == {"unet": 1.0, "text_encoder": 1.0, "all": 1.0}
    assert any("left out: 1 changed" in line and "conv_norm_out.weight" in line for line in lines)
    told = json.loads(safe_open(out, framework="pt").metadata()["sdtune"])
    assert (told["base"], told["merged"]["how"], told["merged"]["tuned"]) == (sd.name, "extract", "model")
    assert status([*words, "--rank", "1", "--overwrite"]) == 0
    got = applied(out)
    for name, delta in want.items():
        tail = float(torch.linalg.svdvals(delta.flatten(1))[1:].square().sum())
        assert float((got[name] - delta).square().sum()) == pytest.approx(tail, rel=1e-3)


def test_a_copy_in_half_precision_has_not_changed(sd, tmp_path):
    StableDiffusionPipeline.from_pretrained(sd, dtype=torch.float16).save_pretrained(tmp_path / "half")
    cfg = {"extract": True, "rank": 2, "output": tmp_path / "x.safetensors", "model": str(sd)}
    for same_model in (sd, tmp_path / "half"):
        with pytest.raises(UserError, match=r"its linear and convolution layers are equal to those of --model"):
            merge(MergeConfig(tuned=str(same_model), **cfg))
    assert not cfg["output"].exists()


def test_extract_wants_two_models_of_a_kind(sd, tmp_path):
    tiny_sd(words=("a",)).save_pretrained(tmp_path / "other")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "other")
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, layers_per_block=2)
    pipe.save_pretrained(tmp_path / "deeper")
    cfg = {"extract": True, "rank": 2, "output": tmp_path / "x.safetensors", "model": str(sd)}
    with pytest.raises(
        UserError, match=r"--tuned .*deeper: unet.* is no such layer in the base.*different kinds of model"
    ):
        merge(MergeConfig(tuned=str(tmp_path / "deeper"), **cfg))
    with pytest.raises(UserError, match="--tuned nowhere: no such folder"):
        merge(MergeConfig(tuned="nowhere", **cfg))


# ---- another rank ----------------------------------------------------------------------------------------------


def test_resize_by_rank_and_by_energy(folder, tmp_path, capsys):
    b, out = folder / "b.safetensors", tmp_path / "small.safetensors"
    words = ["merge", "--resize", "--adapter", str(b), "--output", str(out), "--overwrite"]
    for options in (["--rank", "2"], ["--energy", "0.8"], ["--energy", "0.8", "--rank", "1"]):
        assert status([*words, *options]) == 0
        got, wanted = applied(out), changes(b)
        kept = total = 0.0
        for name, delta in wanted.items():
            squares = torch.linalg.svdvals(delta.flatten(1)).square()
            rank = torch.linalg.matrix_rank(got[name].flatten(1).float(), rtol=1e-4).item()
            if "--energy" in options:
                enough = next(r for r in range(1, 4) if float(squares[:r].sum()) >= 0.8 * float(squares.sum()))
                assert rank == (1 if "--rank" in options else enough)
            else:
                assert rank == 2
            kept += float(squares[:rank].sum())
            total += float(squares.sum())
            error = float((got[name] - delta).square().sum())
            assert error == pytest.approx(float(squares[rank:].sum()), rel=1e-4, abs=1e-9)
        told = energies(capsys.readouterr().out.splitlines())
        assert told["all"] == pytest.approx(kept / total, abs=2e-6)
    merge(MergeConfig(resize=True, adapter=[str(b)], energy=1.0, output=out, overwrite=True))
    same(applied(out), changes(b))


# ---- mistakes --------------------------------------------------------------------------------------------------

A = "--adapter {a}"
MISTAKES = {
    "": "give output, a file for an adapter, or output_dir",
    "--output {o}": "concat needs --adapter",
    f"{A} --output-dir {{d}}": "output_dir needs --model",
    f"{A} --output {{o}} --output-dir {{d}}": "give output, a file for an adapter, or output_dir",
    f"{A} --output x.bin": "an adapter file is named *.safetensors",
    f"{A} --output {{o}} --rank 3": "concat keeps every rank",
    f"{A} --output {{o}} --method svd": "svd needs --rank or --energy",
    f"{A} --output {{o}} --method svd --rank 0": "--rank: ",
    f"{A} --output {{o}} --resize --energy 1.5": "--energy: ",
    f"{A} {{a}} --output {{o}} --resize --rank 1": "resize takes one adapter, not 2",
    f"{A} --output {{o}} --tuned x": "tuned has no effect without extract",
    f"{A} --output-dir {{d}} --model tiny --method svd --rank 2": "output_dir is for a base",
    "--extract --output {o} --rank 2": "extract needs --model and --tuned",
    "--extract --resize --output {o} --rank 2": "give one of them",
    f"{A} --extract --model tiny --tuned tiny --output {{o}} --rank 2": "takes no adapter",
    f"{A}=x --output {{o}}": "no such file or folder",
    f"{A}=nan --output {{o}}": "nan is no weight",
    "--adapter {text} --output {o}": "not a safetensors file",
    f"{A} --output {{a}}": "exists already; give another name or add --overwrite",
    f"{A} {{other}} --output {{o}}": "adapters of different bases do not add up",
    f"{A} --output-dir {{d}} --model nowhere": "--model nowhere: no such folder",
    f"{A} --output-dir {{d}} --model {{sd2}}": "unet.down_blocks.0",
    "--adapter {strange} --output-dir {d} --model {sd}": "0 of its 1 modules are layers of --model",
    f"{A} --output-dir {{sd}} --model {{sd}} --overwrite": "is the base itself",
    f"{A} --output-dir {{empty}} --model {{sd}} --overwrite": "holds something other than a pipeline",
    f"{A} --output-dir {{a}} --model {{sd}} --overwrite": "is a file; give another name",
    f"{A} --output {{text}}/x.safetensors": "cannot be written",
}


@pytest.fixture(scope="module")
def places(folder, sd, tmp_path_factory):
    here = tmp_path_factory.mktemp("mistakes")
    (here / "text").write_text("not tensors")
    (here / "text.safetensors").write_text("not tensors")
    (here / "empty").mkdir()
    (here / "empty" / "letter.txt").write_text("dear")
    wide = {k: torch.cat([v, v], dim=1) if ".lora.down" in k else v for k, v in plain(folder).items()}
    save_file(wide, here / "other.safetensors")
    strange = {
        "unet.nowhere.to_q.lora.down.weight": torch.ones(1, 4),
        "unet.nowhere.to_q.lora.up.weight": torch.ones(4, 1),
    }
    save_file(strange, here / "strange.safetensors")
    shutil.copytree(sd, here / "sd2")
    pipe = tiny_sd()
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, block_out_channels=(32, 64))
    pipe.save_pretrained(here / "sd2")
    files = {"a": folder / "a.safetensors", "other": here / "other.safetensors", "sd": sd, "sd2": here / "sd2"}
    files |= {"strange": here / "strange.safetensors", "text": here / "text.safetensors", "empty": here / "empty"}
    return here, files


def plain(folder):
    tensors = load_file(folder / "a.safetensors")
    return {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in tensors.items()}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_a_line_and_leaves_nothing(words, places, tmp_path, capsys):
    here, files = places
    before = sorted(here.rglob("*"))
    text = words.format(o=tmp_path / "o.safetensors", d=tmp_path / "d", **files)
    assert status(["merge", *text.split()]) == 2
    err = capsys.readouterr().err
    assert MISTAKES[words] in err
    assert err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []
    assert sorted(here.rglob("*")) == before


def test_what_does_not_read_back_gets_no_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtune.models.formats.diffusers_file.Scales", lambda settings: lambda name, rank: (3.0, 1))
    with pytest.raises(RunFailed, match="does not read back"):
        merge(MergeConfig(adapter=[str(folder / "a.safetensors")], output=tmp_path / "out.safetensors", dtype="bf16"))
    assert list(tmp_path.iterdir()) == []
