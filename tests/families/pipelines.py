"""Tiny random pipelines of the stock classes, one for each family; images are 32 x 32 pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from tests.families.encoders import clip, mistral_3, qwen3, qwen_tokenizer, t5, t5_tokenizer
from tests.tinysd import tiny_tokenizer, tiny_vae

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL_VAE = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32, **BLOCKS}


def flow_scheduler(**options: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **options)


def vae16(**options: Any) -> Any:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **SMALL_VAE,
        **options,
    )


def sdxl_unet(text: int, pooled: int, told: int) -> Any:
    """The UNet of SDXL, for states and pooled output of such widths, told as many numbers of sizes."""
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled + told * 8,
    )


def sdxl_vae() -> Any:
    vae = tiny_vae(32, 2)
    vae.register_to_config(scaling_factor=0.13025)
    return vae


def sdxl_scheduler() -> Any:
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return EulerDiscreteScheduler(**schedule, steps_offset=1, timestep_spacing="leading")


def sdxl() -> Any:
    tokenizer = tiny_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=sdxl_vae(),
        unet=sdxl_unet(64, 32, 6),
        text_encoder=clip(tokenizer, False),
        text_encoder_2=clip(tokenizer, True, "gelu"),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        scheduler=sdxl_scheduler(),
    )


def sdxl_refiner() -> Any:
    tokenizer = tiny_tokenizer()
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=sdxl_vae(),
        unet=sdxl_unet(32, 32, 5),
        text_encoder=None,
        text_encoder_2=clip(tokenizer, True, "gelu"),
        tokenizer=None,
        tokenizer_2=tokenizer,
        scheduler=sdxl_scheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def upscaler() -> Any:
    """The VAE divides by 4, and the first layers of each block read the text too, as in the published one."""
    tokenizer = tiny_tokenizer()
    vae = tiny_vae(32, 3)
    vae.register_to_config(scaling_factor=0.08333)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=7,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=400,
        only_cross_attention=True,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=clip(tokenizer, False),
        tokenizer=tokenizer,
        unet=unet,
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
        max_noise_level=350,
    )


def sd3() -> Any:
    tokenizer, tokenizer_3 = tiny_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(shift=3.0),
        vae=vae16(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(tokenizer, True),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, True, "gelu"),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5(tokenizer_3, 64),
        tokenizer_3=tokenizer_3,
    )


def z_image() -> Any:
    tokenizer = qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=32,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=flow_scheduler(shift=3.0),
        vae=vae16(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=qwen3(tokenizer, 3, transformers.Qwen3Model),
        tokenizer=tokenizer,
    )


def flux_2_transformer(**options: Any) -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **options,
    )


def flux_2_vae() -> Any:
    vae = diffusers.AutoencoderKLFlux2(latent_channels=16, **SMALL_VAE)
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    return vae


def flux_2_klein() -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(
        transformer=flux_2_transformer(guidance_embeds=False),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=flux_2_vae(),
        text_encoder=qwen3(tokenizer, 28, transformers.Qwen3ForCausalLM),
        tokenizer=tokenizer,
        is_distilled=False,
    )


def flux_2() -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2Pipeline(
        transformer=flux_2_transformer(guidance_embeds=True),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=flux_2_vae(),
        text_encoder=mistral_3(tokenizer, 31),
        tokenizer=tokenizer,
    )


def flux(kind: Any = diffusers.FluxPipeline) -> Any:
    tokenizer, tokenizer_2 = tiny_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return kind(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=vae16(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(tokenizer, False),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2, 32),
        tokenizer_2=tokenizer_2,
    )


def flux_kontext() -> Any:
    return flux(diffusers.FluxKontextPipeline)


def chroma() -> Any:
    tokenizer = t5_tokenizer()
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=vae16(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=t5(tokenizer, 32),
        tokenizer=tokenizer,
    )


def qwen_image() -> Any:
    tokenizer = qwen_tokenizer()
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 16,
        latents_std=[1.5] * 16,
    )
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_scaling": rope,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    shifts = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.02, **shifts),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        tokenizer=tokenizer,
    )


def save(build: Callable[[], Any], folder: Path) -> Path:
    """Write the pipeline with seeded weights; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build().save_pretrained(folder)
    return folder
