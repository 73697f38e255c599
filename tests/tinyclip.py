"""A CLIP of random weights, made with no download, whose tokenizer knows the words of a few prompts."""

import json
from pathlib import Path

import torch
import transformers


def save_tiny_clip(out: Path) -> None:
    torch.manual_seed(5)
    parts = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=parts | ends | {"vocab_size": 8, "max_position_embeddings": 12, "projection_dim": 16},
        vision_config=parts | {"image_size": 24, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(out)
    words = {w: k for k, w in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "disc</w>", "box</w>"])}
    transformers.CLIPTokenizer(vocab=words, merges=[]).save_pretrained(out)
    write_preprocessor(out, 24)


def write_preprocessor(out: Path, side: int):
    told = {"size": {"height": side, "width": side}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (out / "preprocessor_config.json").write_text(json.dumps(told))
