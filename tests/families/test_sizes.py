"""The size that a base draws at when nobody says one."""

from types import SimpleNamespace

from sdtune.models.families.latent import LatentFamily, stated_size
from sdtune.models.families.stable_diffusion import StableDiffusion


def pipe(denoiser: str, told: dict, vae: dict) -> SimpleNamespace:
    return SimpleNamespace(components={denoiser: SimpleNamespace(config=told)}, vae=SimpleNamespace(config=vae))


def test_a_size_that_diffusers_filled_in_is_not_the_base_s_own():
    """Its 32 pixels, where a VAE's configuration says nothing, are what no base was made for."""
    assert stated_size({"sample_size": 64}) == 64
    assert stated_size({"sample_size": 32, "_use_default_values": ["sample_size"]}) is None
    assert stated_size({}) is None


def test_the_vae_says_the_size_where_the_denoiser_does_not():
    assert LatentFamily.own_side(pipe("transformer", {}, {"sample_size": 64})) == 64
    assert LatentFamily.own_side(pipe("transformer", {"sample_size": 128}, {"sample_size": 1024})) is None
    assert StableDiffusion.own_side(pipe("unet", {"sample_size": 64}, {"sample_size": 512})) is None
    assert StableDiffusion.own_side(pipe("prior", {}, {"sample_size": 512})) is None
