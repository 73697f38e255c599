"""A tiny random CLIP, and around it the prior and decoder of Kandinsky 2.2, of their own classes."""

from pathlib import Path

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from tests.tinysd import tiny_tokenizer

SIDE, WIDTH = 16, 16
"""Pixels that its CLIP sees along a side, and numbers of an embedding."""


def save_tiny_clip(folder: Path) -> None:
    """A CLIPModel with its tokenizer and its image processor; the global RNG is left as it was."""
    tokenizer = tiny_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    tower |= {"projection_dim": WIDTH}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(
            CLIPConfig(
                text_config=tower | special | text,
                vision_config=tower | {"image_size": SIDE, "patch_size": 8},
                projection_dim=WIDTH,
            )
        )
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def save_tiny_prior(folder: Path, clip: Path) -> None:
    """A KandinskyV22PriorPipeline on the CLIP in folder ``clip``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        prior = PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            embedding_dim=WIDTH,
            num_embeddings=77,
            encoder_hid_proj_type=None,
        )
        for parameter in (prior.positional_embedding, prior.prd_embedding, prior.clip_mean):
            parameter.data.normal_()
        prior.clip_std.data.fill_(0.5)
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    parts = CLIPVisionModelWithProjection.from_pretrained(clip), CLIPTextModelWithProjection.from_pretrained(clip)
    processor = CLIPImageProcessor.from_pretrained(clip)
    KandinskyV22PriorPipeline(prior, *parts, tiny_tokenizer(), scheduler, processor).save_pretrained(folder)


def save_tiny_decoder(folder: Path) -> None:
    """A KandinskyV22Pipeline: pictures of 32 pixels, latents of 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
            encoder_hid_dim_type="image_proj",
            encoder_hid_dim=WIDTH,
        )
        movq = VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            num_vq_embeddings=8,
        )
    KandinskyV22Pipeline(unet, DDPMScheduler(beta_schedule="linear"), movq).save_pretrained(folder)
