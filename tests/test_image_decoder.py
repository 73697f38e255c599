"""``sdtune image-decoder``: what it starts from, its loss, and its artefacts in stock diffusers."""

import pytest
import torch
from diffusers import AutoencoderKL, KandinskyV22Pipeline, KandinskyV22PriorPipeline, UNet2DConditionModel
from PIL import Image

from sdtune.config.methods.image_decoder import ImageDecoderConfig
from sdtune.config.sections import UserError
from sdtune.models.unclip_decoder import as_movq
from sdtune.recipes.image_decoder import ImageDecoder
from sdtune.run import stock_lines, usage
from tests.conftest import status
from tests.test_prior import quiet, same, seeded


@pytest.fixture
def run(shared):
    return shared("image-decoder", "--steps", "4")


def recipe_of(pictures, **settings):
    common = {"dataset": str(pictures), "resolution": 32, "num_validation_images": 2}
    return ImageDecoder(ImageDecoderConfig(**common | settings), torch.device("cpu"))


# ---- what it starts from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"shift_factor": 0.3}, {"use_quant_conv": False, "use_post_quant_conv": False}])
def test_a_kl_autoencoder_becomes_a_movq(sd, change):
    """Latents are the mean, shifted and scaled; decoding undoes that. The stock pipeline asks for no more."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config({**AutoencoderKL.load_config(sd, subfolder="vae"), **change}).eval()
    movq, x = as_movq(vae).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(x).latent_dist.mean
        latents = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        torch.testing.assert_close(movq.encode(x).latents, latents, atol=1e-5, rtol=1e-4)
        decoded = movq.decode(latents, force_not_quantize=True).sample
        torch.testing.assert_close(decoded, vae.decode(mean).sample, atol=1e-5, rtol=1e-4)


def test_the_unet_of_a_base_is_taken_over(sd, clip, pictures):
    """All but the way in and the second half of the way out; with the tokens of a text it says what it said."""
    recipe = recipe_of(pictures, model=str(sd), clip_model=str(clip))
    old = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    new = recipe.unet
    assert (new.config.out_channels, new.config.encoder_hid_dim) == (8, 16)
    x, t, tokens = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 32, 32)
    new.encoder_hid_proj.forward = lambda embeds: tokens
    with torch.no_grad():
        said = new(x, t, None, added_cond_kwargs={"image_embeds": torch.zeros(1, 16)}).sample
        torch.testing.assert_close(said[:, :4], old(x, t, tokens).sample)
    assert not said[:, 4:].any()


# ---- what it learns --------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_first_half(decoder, prior, pictures):
    recipe = recipe_of(pictures, model=str(decoder), clip_model=str(prior), embedding_dropout=0.0)
    data = recipe.dataset(2, lambda line: None)
    item = {name: x[None] for name, x in data[3].items() if isinstance(x, torch.Tensor)}
    pipe = quiet(KandinskyV22Pipeline.from_pretrained(decoder))
    t = recipe.objective.timesteps(item["u"])
    z_t = pipe.scheduler.add_noise(item["latents"], item["noise"], t)
    said = pipe.unet(z_t, t, None, added_cond_kwargs={"image_embeds": item["embedding"]}).sample[:, :4]
    torch.testing.assert_close(recipe(item), (said - item["noise"]).square().flatten(1).mean(1))


def test_dropped_embeddings_are_those_that_stock_guides_with(decoder, prior, pictures):
    zero = KandinskyV22PriorPipeline.from_pretrained(prior).get_zero_embed(1)[0]
    settings = {"model": str(decoder), "clip_model": str(prior), "embedding_dropout": 1.0}
    data = recipe_of(pictures, **settings).dataset(2, lambda line: None)
    torch.testing.assert_close(data[0]["embedding"], zero)
    uncached = recipe_of(pictures, **settings, cache=False)
    item = uncached.dataset(2, lambda line: None)[0]
    torch.testing.assert_close(uncached.seen(item["seen"][None], item["dropped"][None])[0], zero)


# ---- what cannot be trained ------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_one_line(sd, clip, decoder, prior, pictures, tmp_path):
    for settings, said in [
        ({"model": str(sd), "clip_model": str(clip), "lora": True}, "--lora: .* decodes nothing yet"),
        ({"model": "tiny-flow", "clip_model": str(clip)}, "a ZImagePipeline; a decoder is made of"),
        ({"model": str(prior), "clip_model": str(clip)}, "a KandinskyV22PriorPipeline; a decoder is made of"),
        ({"model": str(decoder), "clip_model": str(tmp_path)}, f"--clip-model {tmp_path}: "),
        ({"model": str(decoder), "clip_model": str(prior), "resolution": 34}, "--resolution 34: .* multiples of 4"),
    ]:
        with pytest.raises(UserError, match=said):
            recipe_of(pictures, **settings)


# ---- the artefacts ---------------------------------------------------------------------------------------


def test_the_stock_pipeline_loads_it_and_draws(run, prior, tmp_path):
    """Pixel for pixel what `sdtune sample` draws."""
    words = ["sample", "--model", str(run), "--prior", str(prior), "--prompt", "a dog", "--steps", "2"]
    assert status([*words, "--prior-steps", "2", "--seed", "3", "--output-dir", str(tmp_path)]) == 0
    embeds = quiet(KandinskyV22PriorPipeline.from_pretrained(prior))(
        "a dog", num_inference_steps=2, generator=seeded(3)
    )
    stock = quiet(KandinskyV22Pipeline.from_pretrained(run))
    image = stock(**embeds, height=32, width=32, num_inference_steps=2, generator=seeded(3)).images[0]
    assert same(image, tmp_path / "00000.png")
    kind = usage.artefact_kind({str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file()})
    assert usage.sample(kind, "runs/d", "a dog") == [
        *("sdtune", "sample", "--model", "runs/d", "--prior", "...", "--prompt", "a dog")
    ]
    compile(stock_lines.lines(kind, "user/it", None, "", None, "a dog", None), "lines", "exec")


def test_an_adapter_is_loaded_by_stock_diffusers_and_by_sample(shared, decoder, prior, tmp_path):
    out = shared("image-decoder, adapters", "--steps", "4", "--learning-rate", "0.1")
    words = ["sample", "--adapter", str(out), "--prior", str(prior), "--prompt", "a dog", "--steps", "2"]
    assert status([*words, "--prior-steps", "2", "--output-dir", str(tmp_path)]) == 0  # its base is known
    pipe = quiet(KandinskyV22Pipeline.from_pretrained(decoder))
    embeds = quiet(KandinskyV22PriorPipeline.from_pretrained(prior))(
        "a dog", num_inference_steps=2, generator=seeded(0)
    )
    options = {"height": 32, "width": 32, "num_inference_steps": 2}
    before = pipe(**embeds, **options, generator=seeded(0)).images[0]
    pipe.unet.load_lora_adapter(out, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    assert same(pipe(**embeds, **options, generator=seeded(0)).images[0], tmp_path / "00000.png")
    assert not same(before, tmp_path / "00000.png")
    kind = usage.artefact_kind({path.name: path for path in out.iterdir() if path.is_file()})
    assert kind.of_decoder
    compile(stock_lines.lines(kind, "user/it", None, "user/base", None, "a dog", None), "lines", "exec")


def test_samples_on_the_way_are_variations(sd, clip, pictures):
    recipe = recipe_of(pictures, model=str(sd), clip_model=str(clip), validation_inference_steps=2)
    prompts = recipe.dataset(2, lambda line: None).prompts
    images = recipe.sample(prompts, [0, 1])
    assert [image.size for image in images] == [(32, 32), (32, 32)]
    assert all(isinstance(image, Image.Image) for image in images)
