"""Models of pixels that enlarge small images: the network, and the folder of a stock ``IFSuperResolutionPipeline``.

It is the one stock pipeline of pixels that enlarges, made for DeepFloyd IF, whose network reads text and learned its
variance. Here nothing reads the text, so that a call is given a vector of zeros in its place.
"""

from pathlib import Path

from diffusers import IFSuperResolutionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import interpolate

from sdtune.config.methods.super_resolution import SuperResolutionConfig
from sdtune.config.sections import UserError
from sdtune.diffusion.schedulers import Scheduler, with_variance
from sdtune.models.families import silence_libraries
from sdtune.models.pipeline_folder import write_pipeline
from sdtune.models.pixel_networks import check_halvings, levels, sample_size
from sdtune.run.sampling_file import SAMPLING, Sampling

NO_TEXT = 1
"""Numbers of the text embedding that nothing reads."""


def build(cfg: SuperResolutionConfig, scheduler: Scheduler) -> UNet2DConditionModel:
    """The network that the options of Network describe, which is told the level of noise as a class.

    Raises:
        UserError: it halves the images to a fraction of a pixel, or the small ones have one, or there is no such level
            of noise.
    """
    silence_libraries()
    check_halvings(cfg, len(cfg.block_out_channels))
    sides = {"width": cfg.width, "height": cfg.height} if cfg.width else {"resolution": cfg.resolution}
    for option, pixels in (sides | ({"bucket-step": cfg.bucket_step} if cfg.buckets else {})).items():
        if pixels and pixels % cfg.factor:
            raise UserError(f"--{option} {pixels}: wants a multiple of --factor {cfg.factor}")
    timesteps = len(scheduler.alphas_cumprod)
    if cfg.max_noise_level >= timesteps:
        raise UserError(f"--max-noise-level {cfg.max_noise_level}: the last timestep is {timesteps - 1}")
    given = levels(cfg)
    # for each level, since one None for all would be 8 channels a head in this class of diffusers
    given["attention_head_dim"] = (cfg.attention_head_dim,) * len(cfg.block_out_channels)
    return UNet2DConditionModel(
        sample_size=sample_size(cfg),
        in_channels=2 * cfg.channels,
        out_channels=2 * cfg.channels,
        mid_block_type="UNetMidBlock2D",
        class_embed_type="timestep",
        cross_attention_dim=NO_TEXT,
        **given,
    )


def enlarged(small: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, C, h, w]`` at the height and width of ``size``, as the stock pipeline does it."""
    return interpolate(small, size, mode="bilinear", align_corners=True)


def no_text(x: Tensor) -> Tensor:
    """What the network is given for the text of ``x`` ``[B, ...]``."""
    return x.new_zeros(len(x), 1, NO_TEXT)


def pipeline(unet: UNet2DConditionModel, scheduler: Scheduler) -> IFSuperResolutionPipeline:
    """The stock pipeline, without text and without a checker of its images.

    It samples with the fixed small variance: the learned one leaves grain in few steps (docs/log.md).
    """
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    return IFSuperResolutionPipeline(
        **absent,
        unet=unet,
        scheduler=with_variance(scheduler, "fixed_small"),
        image_noising_scheduler=scheduler,
        requires_safety_checker=False,
    )


def sampling(cfg: SuperResolutionConfig) -> Sampling:
    """How the model of a run is sampled: as the grids of the run are."""
    return Sampling(
        cfg.validation_inference_steps,
        call={"guidance_scale": 1.0, "noise_level": 0},
        factor=cfg.factor,
        max_noise_level=cfg.max_noise_level,
    )


def save(out: Path, unet: UNet2DConditionModel, scheduler: Scheduler, how: Sampling) -> list[Path]:
    """Write the folder of the pipeline, whole or not at all; the files it consists of."""
    return write_pipeline(out, pipeline(unet, scheduler), {SAMPLING: how.to_bytes()})
