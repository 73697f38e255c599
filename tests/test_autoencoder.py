"""``sdtune autoencoder``: its losses, what of it trains, and its artefact in stock pipelines and in --vae."""

import json
import math
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtune.config.methods.autoencoder import AutoencoderConfig
from sdtune.config.methods.lora import LoraConfig
from sdtune.config.sections import UserError
from sdtune.config.verbs import SampleConfig
from sdtune.models import families, perceptual
from sdtune.models.discriminator import PatchDiscriminator, adaptive_weights, hinge
from sdtune.models.perceptual import perceptual_distance
from sdtune.recipes.autoencoder import Autoencoder
from sdtune.run import stock_lines, usage
from sdtune.sampling.sample import with_base
from tests.conftest import status

WEIGHTS = "diffusion_pytorch_model.safetensors"
GAME = {"disc_scale": 0.5, "disc_channels": 8, "disc_layers": 1, "perceptual_scale": 0.1}


def recipe_of(sd, pictures, **settings):
    settings = {"resolution": 32, "train_batch_size": 2} | settings
    torch.manual_seed(0)
    recipe = Autoencoder(
        AutoencoderConfig(**{"model": str(sd), "dataset": str(pictures)} | settings), torch.device("cpu")
    )

    recipe.dataset(2, lambda line: None)
    return recipe.train()


def batch_of(recipe, positions=(0, 1)):
    items = [recipe.data[p] for p in positions]
    return {name: torch.stack([item[name] for item in items]) for name in ("pixels", "posterior_noise")}


# ---- losses ----------------------------------------------------------------------------------------------


def test_the_weight_is_the_ratio_of_gradients_at_the_last_layer(sd, pictures):
    """Of each image, by autograd on the weights themselves."""
    recipe = recipe_of(sd, pictures, **GAME)
    loss, figures = recipe(batch_of(recipe))
    last, lambdas = recipe.vae.decoder.conv_out.weight, []
    for k in range(2):
        one = {name: x[k : k + 1] for name, x in batch_of(recipe).items()}
        z = recipe.vae.encode(one["pixels"]).latent_dist
        y = recipe.vae.decode(z.mean + z.std * one["posterior_noise"]).sample
        reconstruction = (y - one["pixels"]).abs().mean() + 0.1 * recipe.perceptual(y, one["pixels"]).sum()
        norms = [
            torch.autograd.grad(part, last, retain_graph=True)[0].norm()
            for part in (reconstruction, -recipe.discriminator(y).mean())
        ]
        lambdas.append(norms[0] / (norms[1] + 1e-4))
    assert torch.allclose(figures["adaptive_weight"], torch.stack(lambdas), rtol=1e-3)
    assert loss.shape == (2,)


def test_one_backward_pass_trains_both_players_each_on_its_own_loss(sd, pictures):
    recipe = recipe_of(sd, pictures, **GAME)
    batch = batch_of(recipe)
    loss, figures = recipe(batch)
    loss.mean().backward()
    got = {name: p.grad.clone() for name, p in recipe.named_parameters() if p.grad is not None}
    recipe.zero_grad()
    x, vae, judge = batch["pixels"], recipe.vae, recipe.discriminator
    z = vae.encode(x).latent_dist
    y = vae.decode(z.mean + z.std * batch["posterior_noise"]).sample
    hinge(judge(x), judge(y.detach())).mean().backward()
    own = {f"discriminator.{name}": p.grad.clone() for name, p in judge.named_parameters()}
    recipe.zero_grad()
    reconstruction = (y - x).abs().flatten(1).mean(1) + 0.1 * recipe.perceptual(y, x)
    fooled = -judge(y).flatten(1).mean(1)
    (reconstruction + 0.5 * figures["adaptive_weight"].detach() * fooled).mean().backward()
    own |= {f"vae.{name}": p.grad for name, p in vae.named_parameters() if p.grad is not None}
    assert got.keys() == own.keys()
    for name, gradient in got.items():
        assert torch.allclose(gradient, own[name], rtol=1e-3, atol=1e-6), name


def test_an_image_is_judged_alone():
    judge = PatchDiscriminator(3, 8, 2)
    x = torch.randn(3, 3, 32, 32)
    assert torch.allclose(judge(x)[1:2], judge(x[1:2]), atol=1e-5)
    wanted, got, h = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.randn(3, 5, 8, 8)
    alone = adaptive_weights(h[1:2], wanted[1:2], got[1:2], 3)
    assert torch.allclose(adaptive_weights(h, wanted, got, 3)[1:2], alone, rtol=1e-4)


def test_a_held_out_loss_is_not_lowered_by_the_discriminator(sd, pictures):
    recipe = recipe_of(sd, pictures, **GAME).eval()
    with torch.no_grad():
        loss, figures = recipe(batch_of(recipe))
    assert torch.allclose(loss, figures["reconstruction"] + 0.1 * figures["perceptual"])
    assert {"disc_loss", "real", "fake"} <= figures.keys()


def test_the_game_begins_at_its_step(sd, pictures):
    recipe = recipe_of(sd, pictures, **GAME, disc_start=3)
    loss, figures = recipe(batch_of(recipe))
    plain = figures["reconstruction"] + 0.1 * figures["perceptual"] + figures["disc_loss"]
    assert torch.allclose(loss, plain) and "adaptive_weight" not in figures
    recipe.step = 3
    assert "adaptive_weight" in recipe(batch_of(recipe))[1]


def test_the_perceptual_distance_moves_the_image_and_not_its_network():
    distance = perceptual_distance("random-conv")
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    found = distance(x, y)
    found.sum().backward()
    assert found.shape == (2,) and (found > 0).all() and y.grad.abs().max() > 0
    assert torch.equal(distance(x, x), torch.zeros(2))
    assert all(p.grad is None for p in distance.parameters())


def test_lpips_from_its_file_is_its_formula(tmp_path, monkeypatch):
    """Names and shapes as the package lpips saves them, but for fewer channels; the sum is written out."""
    widths = ((2, 3), (4, 4), (5, 5, 5), (6, 6, 6), (6, 6, 6))
    monkeypatch.setattr(perceptual, "VGG", widths)
    torch.manual_seed(0)
    tensors, c_in, numbers = {}, 3, iter((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))
    for group, channels in enumerate(widths, 1):
        for c_out in channels:
            name = f"net.slice{group}.{next(numbers)}"
            tensors |= {f"{name}.weight": torch.randn(c_out, c_in, 3, 3), f"{name}.bias": torch.randn(c_out)}
            c_in = c_out
        tensors[f"lin{group - 1}.model.1.weight"] = torch.rand(1, c_in, 1, 1)
    save_file(tensors, tmp_path / "lpips.safetensors")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = torch.zeros(2)
    pair = [(one - shift[:, None, None]) / scale[:, None, None] for one in (x, y)]
    for group in range(1, 6):
        names = [n.removesuffix(".weight") for n in tensors if n.startswith(f"net.slice{group}.") and "weight" in n]
        if group > 1:
            pair = [torch.max_pool2d(one, 2) for one in pair]
        for name in names:
            weights = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            pair = [torch.relu(torch.nn.functional.conv2d(one, *weights, padding=1)) for one in pair]
        one, other = (f / f.norm(dim=1, keepdim=True).clamp(min=1e-3) for f in pair)
        weighted = (one - other).square() * tensors[f"lin{group - 1}.model.1.weight"]
        total += weighted.sum(1).mean((1, 2))
    assert torch.allclose(perceptual_distance(str(tmp_path / "lpips.safetensors"))(x, y), total, rtol=1e-4)
    del tensors["lin3.model.1.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    for name, said in {"less.safetensors": "holds no lins.3", "no.safetensors": "no such file"}.items():
        with pytest.raises(UserError, match=f"--perceptual-network .*{name}: {said}"):
            perceptual_distance(str(tmp_path / name))


# ---- what trains, and the artefact -----------------------------------------------------------------------


def test_the_decoder_alone_trains_and_the_stock_pipeline_draws_with_it(sd, shared, tmp_path):
    run = shared("autoencoder", "--steps", "4")
    before, after = load_file(sd / "vae" / WEIGHTS), load_file(run / WEIGHTS)
    moved = {name.partition(".")[0] for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {"decoder", "post_quant_conv"} and before.keys() == after.keys()
    assert AutoencoderKL.load_config(run) == AutoencoderKL.load_config(sd, subfolder="vae")
    words = ["sample", "--prompt", "a red circle", "--steps", "2", "--output-dir", str(tmp_path)]
    assert status([*words, "--vae", str(run)]) == 0  # its base is that of the run
    drawn = np.asarray(Image.open(tmp_path / "00000.png")).astype(int)
    pipe = StableDiffusionPipeline.from_pretrained(sd, vae=AutoencoderKL.from_pretrained(run))
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator("cpu").manual_seed(0)}
    stock = np.asarray(pipe("a red circle", **options).images[0]).astype(int)
    assert np.abs(drawn - stock).max() <= 1
    kind = usage.artefact_kind({path.name: path for path in run.iterdir()})
    assert kind.autoencoder and usage.sample(kind, "r", "p") == ["sdtune", "sample", "--vae", "r", "--prompt", "p"]
    known = {}
    exec(stock_lines.lines(kind, str(run), None, str(sd), None, "a red circle", None), known)
    assert torch.equal(known["pipe"].vae.decoder.conv_out.weight, after["decoder.conv_out.weight"])


def test_other_verbs_take_it_for_the_bases_own(sd, shared, tmp_path):
    """A merged pipeline holds it, and a method that trains on latents reads it."""
    run, adapter = shared("autoencoder", "--steps", "4"), shared("lora")
    words = ["merge", "--model", str(sd), "--vae", str(run), "--adapter", str(adapter)]
    assert status([*words, "--output-dir", str(tmp_path / "merged")]) == 0
    merged = AutoencoderKL.from_pretrained(tmp_path / "merged", subfolder="vae").state_dict()
    ours = load_file(run / WEIGHTS)
    assert all(torch.equal(weight, ours[name]) for name, weight in merged.items())
    family = families.load(LoraConfig(model=str(sd), vae=str(run), dataset="d"), torch.device("cpu"), torch.float32)
    assert torch.equal(family.part("vae").decoder.conv_out.weight, ours["decoder.conv_out.weight"])


def test_a_vae_that_is_given_is_not_replaced_by_that_of_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("model: base\nvae: old\n")
    cfg = SampleConfig(prompt=["x"], adapter=[str(tmp_path)])
    assert with_base(cfg).vae == "old"
    found = with_base(cfg.model_copy(update={"vae": "new"}))
    assert (found.model, found.vae) == ("base", "new")


def test_with_the_encoder_the_latents_are_scaled_anew(sd, pictures, tmp_path, capsys):
    old = AutoencoderKL.from_pretrained(sd, subfolder="vae")
    channels = [1.0] * old.config.latent_channels
    old.register_to_config(latents_mean=channels, latents_std=channels)  # as some bases have them
    old.save_pretrained(tmp_path / "old")
    words = ["autoencoder", "--vae", str(tmp_path / "old"), "--dataset", str(pictures), "--resolution", "32"]
    words += ["--steps", "3"]
    words += ["--train-encoder", "--learning-rate", "1e-2", "--num-validation-images", "0", "--no-use-ema"]
    assert status([*words, "--output-dir", str(tmp_path / "run")]) == 0
    assert "scaling factor of the new latents" in capsys.readouterr().out
    vae = AutoencoderKL.from_pretrained(tmp_path / "run")
    recipe = recipe_of(sd, pictures, vae=str(tmp_path / "run"))
    x = torch.stack([recipe.data[k]["pixels"] for k in range(11)])
    with torch.no_grad():
        seen = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0)) * vae.config.scaling_factor
    assert seen.std().item() == pytest.approx(1, rel=0.05)
    assert (vae.config.latents_mean, vae.config.latents_std) == (None, None)
    kind = usage.artefact_kind({path.name: path for path in (tmp_path / "run").iterdir()})
    Image.new("RGB", (32, 32), "red").save(tmp_path / "picture.png")
    code = stock_lines.lines(kind, str(tmp_path / "run"), None, "", None, "", None)
    known = {}
    exec(code.replace("picture.png", str(tmp_path / "picture.png")), known)
    assert known["image"].size == (32, 32)


def test_a_new_network_from_its_settings(sd, pictures):
    recipe = recipe_of(sd, pictures, vae_config=str(sd / "vae" / "config.json"), train_encoder=True)
    old = AutoencoderKL.from_pretrained(sd, subfolder="vae")
    assert not torch.equal(recipe.vae.decoder.conv_out.weight, old.decoder.conv_out.weight)
    loss, figures = recipe(batch_of(recipe))
    assert loss.isfinite().all() and {"kl", "psnr"} <= figures.keys()
    assert all(p.requires_grad for p in recipe.vae.parameters())


def test_the_grid_shows_images_beside_their_reconstructions(sd, pictures, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "mine.png")
    recipe = recipe_of(sd, pictures, validation_image=[tmp_path / "mine.png"])
    (prompt,) = recipe.data.prompts
    (image,) = recipe.sample([prompt], [0])
    assert prompt.images[0].getpixel((3, 3)) == (255, 0, 0) and image.size == prompt.images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": 31}, "--resolution 31: this autoencoder needs a multiple of 2"),
        ({"mixed_precision": "fp16"}, "--mixed-precision fp16: .*bf16 works"),
        ({"model": "{sd}/vae"}, "a VAE alone is given as --vae"),
        ({"vae": "{sd}/unet"}, "--vae .*: a UNet2DConditionModel; only an AutoencoderKL is trained"),
        ({"vae": "{tmp}/none/a"}, "no such folder or .safetensors file"),
        ({"vae_config": "{sd}/unet/config.json", "train_encoder": True}, "wants the config.json of an AutoencoderKL"),
        ({"vae_config": "{tmp}/x.json", "train_encoder": True}, "--vae-config .*x.json: No such file"),
        ({"vae": "{tmp}/nan"}, r"--vae .*nan: 1 numbers in 1 tensors are NaN"),
    ],
)
def test_what_cannot_be_trained_is_one_line(settings, said, sd, pictures, tmp_path):
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae")
    vae.decoder.conv_out.bias.data[0] = math.nan
    vae.save_pretrained(tmp_path / "nan")
    filled = {k: v.format(sd=sd, tmp=tmp_path) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=said) as told:
        recipe_of(sd, pictures, **filled)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--vae-config x.json", "vae_config starts from random weights.*--train-encoder"),
        ("--vae-config x.json --vae v --train-encoder", "vae_config and vae both say"),
        ("--disc-scale 1 --disc-channels 12", "disc_channels 12 is no multiple of 8"),
        ("--kl-scale 1", "kl_scale has no effect without train_encoder"),
        ("--decoder_only", "--decoder_only: no such option; the decoder alone trains"),
    ],
)
def test_options_that_do_not_go_together(words, said, capsys):
    assert status(["autoencoder", "--dataset", "d", "--dry-run", *words.split()]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_it_is_not_cut_into_slices(sd, pictures, monkeypatch):
    recipe = recipe_of(sd, pictures)
    monkeypatch.setattr("sdtune.recipes.autoencoder.DTensor", torch.nn.Parameter)  # as FSDP makes of every weight
    with pytest.raises(UserError, match="an autoencoder is not cut into slices"):
        recipe.parameter_groups()


def test_the_card_says_what_it_is(shared):
    run = shared("autoencoder", "--steps", "4")
    assert json.loads((run / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert "--vae" in (run / "report.html").read_text()
