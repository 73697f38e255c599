"""Tiny text encoders of the bases, random, and tokenizers for them."""

from typing import Any

import transformers

from tests.tinysd import WORDS, bpe_tables

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -3.0)]
    pieces += [(chr(c), -5.0 - c / 100) for c in range(33, 127)] + [(f"▁{word}", -2.5) for word in WORDS]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = 512
    return tokenizer


def qwen_tokenizer() -> Any:
    vocab, merges = bpe_tables()
    tokens = list(dict.fromkeys(token.replace("</w>", "") for token in vocab if not token.startswith("<|")))
    pairs = dict.fromkeys((a, b.replace("</w>", "")) for a, b in merges)
    known = [(a, b) for a, b in pairs if {a, b, a + b} <= set(tokens)]
    tokenizer = transformers.Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=known)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template, tokenizer.model_max_length = CHAT, 4096
    return tokenizer


def clip(tokenizer: Any, projects: bool, activation: str = "quick_gelu") -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel)(config)


def t5(tokenizer: Any, width: int) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def qwen3(tokenizer: Any, layers: int, kind: Any) -> Any:
    return kind(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=4096,
        )
    )


def mistral_3(tokenizer: Any, layers: int) -> Any:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"head_dim": 8, "image_size": 28, "patch_size": 14}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**text), vision_config=transformers.PixtralVisionConfig(**vision)
    )
    return transformers.Mistral3ForConditionalGeneration(config)
