"""A complete Stable Diffusion pipeline, random and tiny, built in memory with no download and no torchvision.

    pipe = tiny_sd()                                # ~0.2 M parameters, float32, CPU
    path = save_tiny_sd(tmp_path / "tiny-sd")       # a folder that from_pretrained() accepts

Same classes and same module names as Stable Diffusion 1.5, so LoRA keys, key conversions, single-folder
checkpoints and the training loops see what they would see on the real model. Images are 32x32 by default
(VAE downscale factor 2 with two blocks; pass vae_blocks=4 for the real factor 8).
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = (
    *("a", "photo", "of", "dog", "cat", "sks", "person", "painting", "in", "the", "style"),
    *("red", "blue", "green", "black", "white", "circle", "square"),
)


def byte_alphabet():
    """The 256 printable stand-ins for bytes that byte-level BPE uses (GPT-2's bytes_to_unicode)."""
    keep = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(spare)) for b in range(256)]


def bpe_tables(words=WORDS):
    """(vocab, merges) that cover any text byte by byte and spell each of `words` as one token."""
    letters = byte_alphabet()
    tokens = letters + [c + "</w>" for c in letters]
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # merge from the right, so the end-of-word piece grows
            pair = (parts[-2], parts[-1])
            parts[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append(parts[-1])
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, BOS, EOS]))}
    return vocab, merges


def tiny_tokenizer(words=WORDS, max_length=77):
    vocab, merges = bpe_tables(words)
    # transformers >= 5 takes the tables themselves; 4.x wanted the files that save_slow_files writes
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def save_slow_files(folder, words=WORDS):
    """vocab.json and merges.txt, which transformers 5 no longer writes but 4.x and ComfyUI look for."""
    vocab, merges = bpe_tables(words)
    Path(folder, "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    Path(folder, "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )


def tiny_text_encoder(tokenizer, hidden=32, layers=2, heads=4):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tiny_unet(cross=32, sample=16, in_channels=4):
    return UNet2DConditionModel(
        sample_size=sample,
        in_channels=in_channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def tiny_vae(sample=32, blocks=2):
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=sample,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
    )


def tiny_sd(seed=0, resolution=32, vae_blocks=2, words=WORDS):
    """A StableDiffusionPipeline with seeded random weights; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(words)
        text_encoder = tiny_text_encoder(tokenizer)
        vae = tiny_vae(resolution, vae_blocks)
        unet = tiny_unet(text_encoder.config.hidden_size, resolution // 2 ** (vae_blocks - 1))
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_sd(folder, as_published=True, **kwargs):
    """Write tiny_sd() to a folder; `as_published` gives it the layout Stable Diffusion 1.5 has on the Hub.

    transformers >= 5.6 flattened CLIPTextModel and writes a fresh model without the ``text_model.`` prefix
    (it reads both, and keeps the prefix of a model that was loaded with it); published checkpoints have it.
    """
    folder = Path(folder)
    tiny_sd(**kwargs).save_pretrained(folder)
    if as_published:
        save_slow_files(folder / "tokenizer", kwargs.get("words", WORDS))
        weights = folder / "text_encoder" / "model.safetensors"
        tensors = load_file(weights)
        save_file(
            {f"text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()},
            weights,
            metadata={"format": "pt"},
        )
    return folder


def noise_scheduler(pipe):
    """The DDPM scheduler that training uses, from the pipeline's own scheduler config."""
    return DDPMScheduler.from_config(pipe.scheduler.config)
