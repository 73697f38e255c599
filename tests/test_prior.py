"""``sdtune prior``: its loss, its artefacts in stock diffusers, and `sdtune sample` with it and a decoder of unCLIP."""

import json
import re

import pytest
import torch
import yaml
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline, PriorTransformer
from PIL import Image
from safetensors.torch import load_file

from sdtune.config.methods.unclip_prior import PriorConfig
from sdtune.config.sections import UserError
from sdtune.recipes.prior import Prior
from sdtune.run import stock_lines, usage
from sdtune.sampling.sample_unclip import spherical
from tests.conftest import status


@pytest.fixture
def run(shared):
    return shared("prior", "--steps", "4")


@pytest.fixture
def adapter(shared):
    return shared("prior, adapters", "--steps", "4", "--learning-rate", "0.1")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed):
    return torch.Generator("cpu").manual_seed(seed)


# ---- what it learns --------------------------------------------------------------------------------------


def test_the_loss_is_the_distance_of_whitened_embeddings(pictures, prior):
    """Of Kandinsky's own prior, in its words: the target is (embedding - clip_mean) / clip_std, all timesteps alike."""
    recipe = Prior(PriorConfig(dataset=str(pictures), model=str(prior), resolution=16), torch.device("cpu"))
    data = recipe.dataset(2, lambda line: None)
    item = {name: x[None] for name, x in data[3].items() if isinstance(x, torch.Tensor)}
    loss, figures = recipe(item)
    pipe = quiet(KandinskyV22PriorPipeline.from_pretrained(prior))
    tokens = pipe.tokenizer([data.stream[3].caption], padding="max_length", max_length=77, return_tensors="pt")
    text = pipe.text_encoder(tokens.input_ids)
    image = pipe.image_processor(Image.open(pictures / data.stream[3].name), return_tensors="pt").pixel_values
    embedding = pipe.image_encoder(image).image_embeds
    torch.testing.assert_close(item["embedding"], embedding, atol=5e-2, rtol=0)  # the stream's resize is Lanczos'
    z = (item["embedding"] - pipe.prior.clip_mean) / pipe.prior.clip_std
    t = recipe.objective.timesteps(item["u"])
    z_t = pipe.scheduler.add_noise(z, item["noise"], t)
    said = pipe.prior(z_t, t, text.text_embeds, text.last_hidden_state, tokens.attention_mask.bool())
    torch.testing.assert_close(loss, (said.predicted_image_embedding - z).square().mean(1))
    assert -1 <= figures["cosine"].item() <= 1


def test_a_new_prior_is_whitened_by_the_data_and_kept_so(run, copied, pictures):
    """Its mean and deviation are those of the embeddings; a run that goes on keeps them, whatever the data is then."""
    tensors = load_file(run / "prior" / "diffusion_pytorch_model.safetensors")
    recipe = Prior(PriorConfig(**json_of(run) | {"dataset": str(pictures)}), torch.device("cpu"))
    mean, std = recipe.dataset(2, lambda line: None).statistics()
    torch.testing.assert_close(tensors["clip_mean"], mean)
    torch.testing.assert_close(tensors["clip_std"], std)
    out = copied("prior", "other", "--steps", "4")
    words = ["prior", "--config", str(out / "config.yaml"), "--output-dir", str(out), "--steps", "5"]
    assert status([*words, "--max-train-samples", "4", "--allow-change"]) == 0
    again = load_file(out / "prior" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(again["clip_mean"], tensors["clip_mean"])
    assert not torch.equal(again["proj_in.weight"], tensors["proj_in.weight"])


def json_of(run):
    """The settings of a finished run, without its folder."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    return {name: values[name] for name in ("clip_model", "resolution", "num_layers")}


# ---- what cannot be trained ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--clip-model c --model m", "clip_model describes a new prior"),
        ("", "model or clip_model: give a prior to continue"),
        ("--clip-model c --lora", "lora adapts a prior that there is"),
        ("--model m --buckets", "CLIP sees squares"),
        ("--clip-model c --resolution 8", None),
    ],
)
def test_options_that_do_not_go_together(words, said, capsys):
    code = status(["prior", "--dataset", "d", "--dry-run", *words.split()])
    assert code == (2 if said else 0)
    assert (said or "") in capsys.readouterr().err


def test_what_is_no_prior_is_one_line(pictures, clip, prior, sd, tmp_path):
    for settings, said in [
        ({"model": str(sd)}, "--model .*: no prior in that folder"),
        ({"model": str(tmp_path / "none")}, "--model .*none: no such folder"),
        ({"clip_model": str(tmp_path)}, f"--clip-model {tmp_path}: "),
        ({"clip_model": str(clip), "resolution": 24}, "--resolution 24: this CLIP sees pictures of 16"),
        ({"clip_model": str(clip), "attention_head_dim": 5}, "--attention-head-dim 5: does not divide 32"),
    ]:
        with pytest.raises(UserError, match=said):
            Prior(PriorConfig(**{"dataset": str(pictures), "resolution": 16} | settings), torch.device("cpu"))


# ---- the artefacts ---------------------------------------------------------------------------------------


def test_the_stock_pipeline_loads_it_and_draws(run, decoder, tmp_path):
    """Pixel for pixel what `sdtune sample` draws, in any batch; its CLIP is the one it was given."""
    index = json.loads((run / "model_index.json").read_text())
    assert index["_class_name"] == "KandinskyV22PriorPipeline"
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    words = ["sample", "--model", str(decoder), "--prior", str(run), "--prompt", "a red circle", "a dog"]
    words += ["--steps", "2", "--prior-steps", "3", "--seed", "4", "--output-dir", str(tmp_path / "out")]
    assert status(words) == 0
    prior, stock = (quiet(kind.from_pretrained(folder)) for kind, folder in pipelines(run, decoder))
    for k, prompt in enumerate(("a red circle", "a dog")):
        embeds = prior(prompt, num_inference_steps=3, generator=seeded(4 + k))
        image = stock(**embeds, height=32, width=32, num_inference_steps=2, generator=seeded(4 + k)).images[0]
        assert same(image, tmp_path / "out" / f"0000{k}.png")


def pipelines(prior, decoder):
    return (KandinskyV22PriorPipeline, prior), (KandinskyV22Pipeline, decoder)


def same(image, file):
    with Image.open(file) as drawn:
        difference = torch.tensor(list(image.tobytes())) - torch.tensor(list(drawn.tobytes()))
    return difference.abs().max() <= 1  # a batch of two rounds otherwise than one


def test_an_adapter_is_loaded_by_stock_diffusers_and_by_sample(adapter, prior, decoder, tmp_path):
    pipe = quiet(KandinskyV22PriorPipeline.from_pretrained(prior))
    before = pipe("a dog", num_inference_steps=2, generator=seeded(0)).image_embeds
    pipe.prior.load_lora_adapter(adapter, prefix="prior", weight_name="pytorch_lora_weights.safetensors")
    embeds = pipe("a dog", num_inference_steps=2, generator=seeded(0))
    assert (embeds.image_embeds - before).abs().max() > 1e-3
    words = ["sample", "--model", str(decoder), "--prior", str(prior), "--adapter", str(adapter), "--prompt", "a dog"]
    words += ["--prior-steps", "2", "--steps", "2", "--output-dir", str(tmp_path / "out")]
    assert status(words) == 0
    stock = quiet(KandinskyV22Pipeline.from_pretrained(decoder))
    image = stock(**embeds, height=32, width=32, num_inference_steps=2, generator=seeded(0)).images[0]
    assert same(image, tmp_path / "out" / "00000.png")
    kind = usage.artefact_kind({path.name: path for path in adapter.iterdir() if path.is_file()})
    assert kind.of_prior
    assert "--prior" in usage.sample(kind, str(adapter), "a dog")
    compile(stock_lines.lines(kind, "user/it", None, "user/base", None, "a dog", None), "lines", "exec")


def test_variations_and_what_lies_between_two_images(prior, decoder, pictures, tmp_path):
    files = [str(pictures / "00.png"), str(pictures / "01.png")]
    common = ["sample", "--model", str(decoder), "--prior", str(prior), "--steps", "2", "--output-dir", str(tmp_path)]
    assert status([*common, "--image", files[0], "--num-images-per-prompt", "2"]) == 0
    assert status([*common, "--interpolate", *files, "--interpolate-count", "1"]) == 0
    assert (tmp_path / "interpolation.png").is_file()
    pipe, stock = (quiet(kind.from_pretrained(folder)) for kind, folder in pipelines(prior, decoder))
    ends = [pipe.image_encoder(seen(pipe, file)).image_embeds for file in files]
    nothing = pipe.get_zero_embed(1)
    wanted = [(ends[0], 0), (ends[0], 1), (ends[0], 0), (spherical(*ends, 0.5), 0), (ends[1], 0)]
    for k, (embeds, seed) in enumerate(wanted):
        options = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": seeded(seed)}
        assert same(stock(embeds, nothing, **options).images[0], tmp_path / f"0000{k}.png")


def seen(pipe, file):
    with Image.open(file) as image:
        return pipe.image_processor(image.convert("RGB"), return_tensors="pt").pixel_values


def test_the_arc_between_two_embeddings():
    """Slerp: equal angles for equal shares, and a length between theirs."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    torch.testing.assert_close(spherical(a, b, 1 / 3), 8 / 3 * torch.tensor([[3**0.5 / 2, 0.5]]))
    torch.testing.assert_close(spherical(a, 3 * a, 0.5), 2 * a)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model {decoder} --prompt x", "--prior: .* draws what a prior says"),
        ("--model {decoder} --prior {prior}", "there is nothing to draw"),
        ("--model {decoder} --prior {prior} --prompt x --image {picture}", "--prompt and --image"),
        ("--model {decoder} --prior {prior} --prompt x --clip-skip 2", "--clip-skip: not for a decoder of unCLIP"),
        ("--model {decoder} --prior {prior} --prompt x --width 34 --height 34", "draws multiples of 4 pixels"),
        ("--model {prior} --prompt x", "a prior, which draws nothing"),
        ("--model tiny --prior {prior} --prompt x", "--prior: not for a text-to-image model, which tiny is"),
        ("--model {decoder} --prior {decoder} --prompt x", "--prior .*: no prior in that folder"),
    ],
)
def test_what_cannot_be_drawn(words, said, prior, decoder, pictures, tmp_path, capsys):
    places = {"prior": prior, "decoder": decoder, "picture": pictures / "00.png"}
    words = [word.format(**places) for word in words.split()]
    assert status(["sample", *words, "--output-dir", str(tmp_path / "out"), "--steps", "1"]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_an_adapter_of_a_prior_says_no_base(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("method: prior\nmodel: m\n")
    assert status(["sample", "--adapter", str(tmp_path), "--prompt", "x", "--output-dir", str(tmp_path / "out")]) == 2
    assert f"--model: {tmp_path} is of a prior; name the decoder that draws" in capsys.readouterr().err


def test_what_it_is_called(run):
    kind = usage.artefact_kind(
        {str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file() and p.parent != run / "checkpoints"}
    )
    assert usage.sample(kind, "runs/prior", "a dog")[2:6] == ["--model", "...", "--prior", "runs/prior"]
    compile(stock_lines.lines(kind, "user/it", None, "", None, "a dog", None), "lines", "exec")
    assert PriorTransformer.load_config(run, subfolder="prior")["num_layers"] == 1
