"""The parts of the embedded base `tiny-flow`, untrained: tokenizer, text encoder, transformer."""

from functools import cache

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from sdtune.data import toy_world

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST = "triangle orange painting green heart red the toy".split()
"""Words whose merges come before those of longer words, which would cut them."""
PAD, MARKS = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
WIDTH, LAYERS, HEADS, TEXT_WIDTH = 96, 4, 4, 96


def make_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE for any text, with each word of the toy world as one token, alone and after a space."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys([*FIRST, *sorted((*toy_world.WORDS, "user", "assistant"), key=len, reverse=True)]):
        for k in range(len(word) - 2, -2, -1):
            pair = (word[k] if k >= 0 else "Ġ", word[k + 1 :])
            if pair not in merges:
                merges.append(pair)
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges), PAD])
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, pad_token=PAD)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template, tokenizer.model_max_length = CHAT, 4096
    return tokenizer


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """Two layers, of which the stock pipeline reads the first: the last but one hidden state."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=4096,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(MARKS[1]),
        )
    )


def make_transformer() -> ZImageTransformer2DModel:
    """An image of 64 x 64 pixels is 64 tokens, a caption 32. Rotations are faster than for images of 4,096 tokens."""
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=LAYERS,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_WIDTH,
        rope_theta=100.0,
        axes_dims=[8, 8, 8],
        axes_lens=[512 + 64, 64, 64],
    )
    for block in (*model.layers, *model.noise_refiner):  # every block starts as the same, open gate at every time
        linear = block.adaLN_modulation[0]
        nn.init.zeros_(linear.weight)
        linear.bias.data = torch.tensor([0.0, 0.4, 0.0, 0.4]).repeat_interleave(WIDTH)
    for final in model.all_final_layer.values():
        nn.init.zeros_(final.linear.weight)
        nn.init.zeros_(final.adaLN_modulation[1].weight)
    tell_places(model)
    return model


@torch.no_grad()
def tell_places(model: ZImageTransformer2DModel) -> None:
    """Let tokens of the image know from the first step where they are.

    Rotary embeddings say it in one way only: how much a token attends to the caption, which stands at (0, 0), depends
    on its row and column. So each head of the first layer begins with a query that all tokens of an image share and a
    key that all fillers of captions share, in one pair of dimensions: two heads for rows, two for columns.
    """
    shared, filler = model.all_x_embedder["2-1"].bias, model.cap_pad_token[0]
    for vector, size in ((shared, 0.6), (filler, 1.0)):
        vector.copy_(size * torch.randn(WIDTH).sign())
    for block in model.context_refiner:
        block.attention_norm2.weight.fill_(0.4)
        block.ffn_norm2.weight.fill_(0.4)
    attention, side = model.layers[0].attention, WIDTH // HEADS
    for head, pair in enumerate((5, 9, 4, 8)):  # pairs 4 to 7 turn with the row, 8 to 11 with the column
        row = head * side + 2 * pair
        attention.to_q.weight[row] += 3 * shared / shared.square().sum()
        attention.to_k.weight[row] += 3 * filler / filler.square().sum()


class Captions:
    """Tokens of captions in the chat template, as the stock pipeline makes them."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self.tokenizer = tokenizer
        self.tokens = cache(self._tokens)

    def _tokens(self, caption: str) -> Tensor:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return torch.tensor(self.tokenizer(text).input_ids)
