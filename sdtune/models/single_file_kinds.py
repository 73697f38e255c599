"""The kinds of single-file checkpoints: the settings of their parts, and their tokenizers, as files of diffusers.

These are the same for all models of a kind. Of CLIP's tokenizer the merges come with sdtune: its vocabulary is the 256
byte letters, the same as ends of words, what each merge makes, and two marks (Radford et al. 2021;
``simple_tokenizer.py`` of openai/CLIP, MIT licence). Of T5's come the pieces with their scores (Raffel et al. 2020;
``spiece.model`` of google/t5-v1_1-xxl, Apache-2.0).
"""

import base64
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[1] / "assets" / "single_file"

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
OPEN_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
OPEN_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "pad_token_id": 1}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2, "model_type": "clip_text_model"}

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_1 = UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
UNET_2 = UNET | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
UNET_XL = UNET | {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
MMDIT = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
MMDIT_3 = MMDIT | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
MMDIT_35_MEDIUM = MMDIT_3 | {
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
MMDIT_35_LARGE = MMDIT | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
VAE_16 = VAE | {
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5_XXL = {
    "model_type": "t5",
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}

STABLE_DIFFUSION_3 = {
    "vae": (["diffusers", "AutoencoderKL"], VAE_16),
    "text_encoder": (["transformers", "CLIPTextModelWithProjection"], TEXT | CLIP_L),
    "text_encoder_2": (["transformers", "CLIPTextModelWithProjection"], TEXT | OPEN_CLIP_G),
    "text_encoder_3": (["transformers", "T5EncoderModel"], T5_XXL),
    "tokenizer": (["transformers", "CLIPTokenizer"], {"pad_token": "<|endoftext|>"}),
    "tokenizer_2": (["transformers", "CLIPTokenizer"], {"pad_token": "!"}),
    "tokenizer_3": (["transformers", "T5TokenizerFast"], {"model_max_length": 512}),
    "scheduler": (["diffusers", "FlowMatchEulerDiscreteScheduler"], {"num_train_timesteps": 1000, "shift": 3.0}),
}

SETTINGS: dict[str, dict[str, tuple[list[str], dict[str, Any]]]] = {
    "v1": {
        "unet": (["diffusers", "UNet2DConditionModel"], UNET_1),
        "vae": (["diffusers", "AutoencoderKL"], VAE | {"sample_size": 512, "scaling_factor": 0.18215}),
        "text_encoder": (["transformers", "CLIPTextModel"], TEXT | CLIP_L),
        "tokenizer": (["transformers", "CLIPTokenizer"], {"pad_token": "<|endoftext|>"}),
        "scheduler": (
            ["diffusers", "PNDMScheduler"],
            BETAS | {"skip_prk_steps": True, "set_alpha_to_one": False, "prediction_type": "epsilon"},
        ),
    },
    "v2": {
        "unet": (["diffusers", "UNet2DConditionModel"], UNET_2),
        "vae": (["diffusers", "AutoencoderKL"], VAE | {"sample_size": 768, "scaling_factor": 0.18215}),
        "text_encoder": (["transformers", "CLIPTextModel"], TEXT | OPEN_CLIP_H),
        "tokenizer": (["transformers", "CLIPTokenizer"], {"pad_token": "!"}),
        "scheduler": (
            ["diffusers", "DDIMScheduler"],
            BETAS | {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
        ),
    },
    "xl_base": {
        "unet": (["diffusers", "UNet2DConditionModel"], UNET_XL),
        "vae": (["diffusers", "AutoencoderKL"], VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
        "text_encoder": (["transformers", "CLIPTextModel"], TEXT | CLIP_L),
        "text_encoder_2": (["transformers", "CLIPTextModelWithProjection"], TEXT | OPEN_CLIP_G),
        "tokenizer": (["transformers", "CLIPTokenizer"], {"pad_token": "<|endoftext|>"}),
        "tokenizer_2": (["transformers", "CLIPTokenizer"], {"pad_token": "!"}),
        "scheduler": (
            ["diffusers", "EulerDiscreteScheduler"],
            BETAS | {"timestep_spacing": "leading", "prediction_type": "epsilon"},
        ),
    },
    "sd3": {"transformer": (["diffusers", "SD3Transformer2DModel"], MMDIT_3)} | STABLE_DIFFUSION_3,
    "sd35_medium": {"transformer": (["diffusers", "SD3Transformer2DModel"], MMDIT_35_MEDIUM)} | STABLE_DIFFUSION_3,
    "sd35_large": {"transformer": (["diffusers", "SD3Transformer2DModel"], MMDIT_35_LARGE)} | STABLE_DIFFUSION_3,
}
"""Kind of checkpoint as diffusers names it, to the class and the settings of each part as its makers published them.

That a file of Stable Diffusion 2 predicts the velocity is a guess, since it does not say; ``--prediction-type`` does.
"""
PIPELINES = {"v1": "StableDiffusionPipeline", "v2": "StableDiffusionPipeline", "xl_base": "StableDiffusionXLPipeline"}
PIPELINES |= dict.fromkeys(("sd3", "sd35_medium", "sd35_large"), "StableDiffusion3Pipeline")
CHECKED = ("v1", "v2")
"""Kinds whose pipeline takes a safety checker; a file holds none."""


def write_settings(folder: Path, kind: str) -> None:
    """The settings and tokenizers of a kind of checkpoint as a pipeline folder without weights."""
    parts = SETTINGS[kind]
    index: dict[str, Any] = {"_class_name": PIPELINES[kind]} | {name: key for name, (key, _) in parts.items()}
    if kind in CHECKED:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for name, ((_, class_name), settings) in parts.items():
        (folder / name).mkdir()
        if name.startswith("tokenizer"):
            write = write_clip_tokenizer if class_name == "CLIPTokenizer" else write_t5_tokenizer
            write(folder / name, settings)
            continue
        own = {"architectures": [class_name]} if "text" in name else {"_class_name": class_name}
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(own | settings), encoding="utf-8")


def write_clip_tokenizer(folder: Path, settings: Mapping[str, Any]) -> None:
    """CLIP's tokenizer, as the files that transformers reads."""
    merges = gzip.decompress((ASSETS / "clip_merges.txt.gz").read_bytes()).decode()
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["".join(line.split()) for line in merges.splitlines()]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: k for k, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"} | dict(
        settings
    )
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


def write_t5_tokenizer(folder: Path, settings: Mapping[str, Any]) -> None:
    """T5's tokenizer, as the files that transformers reads: marks, pieces with their scores, and places to fill in."""
    from transformers import T5Tokenizer

    text = gzip.decompress((ASSETS / "t5_pieces.txt.gz").read_bytes()).decode()
    characters, *lines = text.splitlines()
    pieces = [(piece, float(score)) for piece, score in (line.split("\t") for line in lines)]
    marks, places = ("<pad>", "</s>", "<unk>"), [f"<extra_id_{k}>" for k in reversed(range(100))]
    vocabulary = [*((mark, 0.0) for mark in marks), *pieces, *((place, 0.0) for place in places)]
    tokenizer = T5Tokenizer(vocab=vocabulary, _spm_precompiled_charsmap=base64.b64decode(characters), **settings)
    tokenizer.save_pretrained(folder)


def byte_letters() -> list[str]:
    """A visible letter for each byte, those that have one first (Radford et al. 2019)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) for b in visible] + [chr(256 + k) for k in range(len(hidden))]
