"""The decoder of unCLIP as Kandinsky 2.2 has it: one that is continued, or one made of a Stable Diffusion base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22Pipeline,
    UNet2DConditionModel,
    VQModel,
)
from torch import Tensor

from sdtune.config.methods.image_decoder import ImageDecoderConfig
from sdtune.config.sections import UserError
from sdtune.models import families
from sdtune.models.networks import reshaped
from sdtune.models.part_files import ConfigOnly, read_part, read_scheduler
from sdtune.models.unclip import Towers
from sdtune.run.usage import DECODER

TRAINED = "unet"
"""The part of the pipeline that trains."""
BASES = ("StableDiffusionPipeline",)
"""Classes of pipelines of which a new decoder is made."""
OF_MOVQ = (
    "block_out_channels layers_per_block latent_channels norm_num_groups down_block_types up_block_types act_fn "
    "sample_size mid_block_add_attention"
).split()
"""Settings of a KL autoencoder that a VQModel has too."""


class Decoder(NamedTuple):
    unet: Any
    """A UNet2DConditionModel that gives twice the channels; the second half is a variance."""
    movq: Any
    """A VQModel that is not quantised: its latents have a variance of about 1."""
    scheduler: Any


def read_decoder(cfg: ImageDecoderConfig, width: int, device: torch.device) -> Decoder:
    """The decoder of ``cfg`` in fp32; on the meta device shapes alone.

    Args:
        width: numbers of an embedding.

    Raises:
        UserError: a part cannot be read, the base is of another class, or it decodes other embeddings.
    """
    families.silence_libraries()
    source, where = families.resolve_model(cfg.model), f"--model {cfg.model}"
    kind = families.model_index(source, cfg).get("_class_name", "")
    hub = {"revision": cfg.revision, "cache_dir": cfg.cache_dir}

    def part(of: Any, name: str) -> Any:
        place = {"subfolder": name, **hub}
        if device.type == "meta":
            config = read_part(ConfigOnly(of), source, f"{where}: {name}", **place)
            with torch.device("meta"):
                return of.from_config(config)
        return read_part(of, source, f"{where}: {name}", **place).float().to(device)

    scheduler = read_scheduler(DDIMScheduler, source, f"{where}: scheduler", subfolder="scheduler", **hub)
    if kind == DECODER:
        scheduler = read_scheduler(DDPMScheduler, source, f"{where}: scheduler", subfolder="scheduler", **hub)
        unet, movq = part(UNet2DConditionModel, "unet"), part(VQModel, "movq")
        if unet.config.encoder_hid_dim != width:
            raise UserError(
                f"--clip-model {cfg.clip_model}: its embeddings have {width} numbers, and {cfg.model} decodes "
                f"{unet.config.encoder_hid_dim}; give the CLIP that it was made with"
            )
    elif kind not in BASES:
        raise UserError(f"{where}: a {kind}; a decoder is made of a StableDiffusionPipeline, or is a {DECODER}")
    elif cfg.lora:
        raise UserError(
            f"--lora: {cfg.model} reads text and decodes nothing yet; train all weights once, then adapt that"
        )
    else:
        unet = told_embeddings(part(UNet2DConditionModel, "unet"), width)
        movq = as_movq(part(AutoencoderKL, "vae"))
    return Decoder(unet, movq.eval().requires_grad_(False), scheduler)


def told_embeddings(unet: Any, width: int) -> Any:
    """A UNet that reads text, made to read embeddings: it attends to 32 tokens, which a new layer makes of one."""
    new = reshaped(
        unet,
        out_channels=2 * unet.config.out_channels,
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=width,
    )
    if new.device.type != "meta":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = type(new.encoder_hid_proj)(width, new.config.cross_attention_dim)
        new.encoder_hid_proj.load_state_dict(fresh.state_dict())
    return new


@torch.no_grad()
def as_movq(vae: Any) -> Any:
    """A KL autoencoder as the ``VQModel`` that the stock pipeline holds: its latents are the mean, scaled and shifted.

    The layer that makes mean and variance of the encoder's output is folded into the one before it, and scale and
    shift into those beside the latents. There is no codebook: the stock pipeline decodes what was not quantised.
    """
    with torch.device(vae.device):
        movq = VQModel(**{name: vae.config[name] for name in OF_MOVQ}, num_vq_embeddings=1)
    if vae.device.type == "meta":
        return movq
    C, scale, shift = vae.config.latent_channels, vae.config.scaling_factor, vae.config.shift_factor or 0.0
    encoder = vae.encoder.state_dict()
    weight, bias = encoder["conv_out.weight"], encoder["conv_out.bias"]
    if vae.quant_conv is not None:
        mixing = vae.quant_conv.weight[:, :, 0, 0]
        weight, bias = torch.einsum("om,mikl->oikl", mixing, weight), mixing @ bias + vae.quant_conv.bias
    encoder |= {"conv_out.weight": weight[:C], "conv_out.bias": bias[:C]}
    movq.encoder.load_state_dict(encoder)
    movq.decoder.load_state_dict(vae.decoder.state_dict())
    unit = torch.eye(C, device=vae.device)[:, :, None, None]
    movq.quant_conv.load_state_dict({"weight": scale * unit, "bias": torch.full((C,), -scale * shift)})
    after = unit if vae.post_quant_conv is None else vae.post_quant_conv.weight
    offset = after.sum((1, 2, 3)) * shift + (0 if vae.post_quant_conv is None else vae.post_quant_conv.bias)
    movq.post_quant_conv.load_state_dict({"weight": after / scale, "bias": offset})
    return movq


def read_towers(cfg: ImageDecoderConfig, device: torch.device) -> Towers:
    """The CLIP of ``cfg``, of a folder or Hub id of its own or of a prior's pipeline."""
    path = Path(cfg.clip_model).expanduser()
    where = f"--clip-model {cfg.clip_model}"
    inside = (path / "image_encoder" / "config.json").is_file()
    if not path.exists():
        inside = "image_encoder" in remote_index(cfg)
    return Towers(str(path) if path.exists() else cfg.clip_model, where, device, inside, cache_dir=cfg.cache_dir)


def remote_index(cfg: ImageDecoderConfig) -> Mapping[str, Any]:
    """The parts that a repository has as a pipeline; none for a model alone."""
    try:
        return families.model_index(cfg.clip_model, cfg.model_copy(update={"revision": None}))
    except UserError:
        return {}


def decoder_pipeline(decoder: Decoder) -> KandinskyV22Pipeline:
    """The stock pipeline."""
    pipe = KandinskyV22Pipeline(decoder.unet, decoder.scheduler, decoder.movq)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def side_multiple(movq: Any) -> int:
    """Sides of a picture are multiples of this: the stock pipeline rounds to the square of a latent's scale."""
    scale = 2 ** (len(movq.config.block_out_channels) - 1)
    return scale * scale


def encoded(movq: Any, pixels: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` of pixels in [-1, 1]."""
    latents: Tensor = movq.encode(pixels.to(movq.device)).latents
    return latents
