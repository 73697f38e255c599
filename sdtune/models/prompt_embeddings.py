"""Prompts as embeddings, where the stock call does not make them: in several windows, and with weights on words.

A window is what a CLIP text encoder reads at once, of Stable Diffusion 75 tokens between the marks of begin and end. A
longer text is read window by window, and the embeddings stand one behind the other, as user interfaces and kohya's
scripts have it. Weights are those of compel.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from sdtune.config.sections import UserError
from sdtune.models.prompts import compel_syntax, without_weights

WindowTensors = Callable[[Sequence[Any]], dict[str, Tensor]]
"""From the outputs of all text encoders to what the denoiser is told of each window, ``[W, ...]`` by name."""


class Reading(NamedTuple):
    """How prompts are read; as the stock call does it, unless one of these is set."""

    long_prompts: bool = False
    prompt_weights: bool = False


class TextParts(NamedTuple):
    """Text encoders with their tokenizers, and what their outputs mean."""

    encoders: list[Any]
    tokenizers: list[Any]
    tensors_of: WindowTensors

    def windows(self, text: str) -> int:
        """How many windows a text fills."""
        return max(len(windows(tokenizer, text)) for tokenizer in self.tokenizers)


def windows(tokenizer: Any, text: str) -> list[list[int]]:
    """The token ids of a text, a list for each window, with its marks and filled up; one window at least."""
    spelt = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    ids = tokenizer(spelt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    room = tokenizer.model_max_length - 2
    parts = [ids[k : k + room] for k in range(0, len(ids), room)] or [[]]
    begin, end, fill = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [[begin, *part, end, *[fill] * (room - len(part))] for part in parts]


def embed(parts: TextParts, texts: Sequence[str], least: int = 1) -> list[dict[str, Tensor]]:
    """What the denoiser is told of each text: ``embeds`` ``[L, D]`` of all its windows, the rest of its first one.

    Args:
        least: windows that a text gets at least; those beyond its end are empty.
    """
    counts = [max(least, parts.windows(text)) for text in texts]
    outputs = []
    for encoder, tokenizer in zip(parts.encoders, parts.tokenizers, strict=True):
        (empty,) = windows(tokenizer, "")
        rows = []
        for text, count in zip(texts, counts, strict=True):
            own = windows(tokenizer, text)
            rows += own + [empty] * (count - len(own))
        outputs.append(encoder(torch.tensor(rows, device=encoder.device), output_hidden_states=True))
    tensors = {name: tensor.split(counts) for name, tensor in parts.tensors_of(outputs).items()}
    return [
        {name: of[k].flatten(0, 1) if name == "embeds" else of[k][0] for name, of in tensors.items()}
        for k in range(len(texts))
    ]


def embed_weighted(
    parts: TextParts, pipe: Any, texts: Sequence[str], long_prompts: bool, least: int = 1
) -> list[dict[str, Tensor]]:
    """As `embed`, all of one length, with the weights that stand in the texts; the pooled embedding ignores them.

    Raises:
        UserError: compel is not installed, or cannot read a text.
    """
    try:
        from compel import Compel, DiffusersTextualInversionManager, ReturnedEmbeddingsType, SplitLongTextMode
    except ImportError as error:
        raise UserError(f"--prompt-weights: {error}; pip install 'sdtune[prompts]'") from None
    kinds = ReturnedEmbeddingsType
    several = len(parts.encoders) > 1
    kind = kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if several else kinds.LAST_HIDDEN_STATES_NORMALIZED
    readers = [
        Compel(
            tokenizer,
            encoder,
            DiffusersTextualInversionManager(pipe),
            truncate_long_prompts=not long_prompts,
            returned_embeddings_type=kind,
            split_long_text_mode=SplitLongTextMode.BRUTAL,
        )
        for encoder, tokenizer in zip(parts.encoders, parts.tokenizers, strict=True)
    ]
    found = embed(parts, [without_weights(text) for text in texts], least)
    weighted = []
    for text in texts:
        try:
            weighted.append([reader(compel_syntax(text))[0] for reader in readers])
        except Exception as error:  # of its parser, which has classes of its own
            raise UserError(f"--prompt-weights: {text!r} cannot be read ({error})") from None
    empty = [reader("")[0] for reader in readers]
    window = len(empty[0])
    longest = max(least, *(len(row) // window for rows in weighted for row in rows))
    for tensors, rows in zip(found, weighted, strict=True):
        filled = [torch.cat([row, *[e] * (longest - len(row) // window)]) for row, e in zip(rows, empty, strict=True)]
        tensors["embeds"] = torch.cat(filled, dim=-1).to(tensors["embeds"].dtype)
    return found


def prompt_arguments(
    pipe: Any, parts: TextParts | None, prompts: Sequence[str], negative: str | None, reading: Reading
) -> dict[str, Any]:
    """The arguments of the stock call that say what to draw: the texts, or their embeddings.

    Args:
        parts: of the pipeline; None where prompts are read as the stock call reads them.
        negative: the same for all prompts; None for what the stock call takes for none.
    """
    if parts is None:
        return {"prompt": list(prompts)} | ({"negative_prompt": [negative] * len(prompts)} if negative else {})
    texts = [*prompts, negative or ""]
    least = max(map(parts.windows, map(without_weights, texts))) if reading.long_prompts else 1
    if reading.prompt_weights:
        rows = embed_weighted(parts, pipe, texts, reading.long_prompts, least)
    else:
        rows = embed(parts, texts, least)
    names = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    arguments = {names[name]: torch.stack([row[name] for row in rows[:-1]]) for name in rows[0]}
    if negative or not pipe.config.get("force_zeros_for_empty_prompt"):  # else the stock call makes the zeros
        arguments |= {f"negative_{names[name]}": torch.stack([rows[-1][name]] * len(prompts)) for name in rows[0]}
    return arguments
