"""What a text encoder does not read of a prompt: words beyond its window, and the syntax of other programs."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTokenizer, CLIPTokenizerFast

from sdtune.config.sections import UserError

LORA_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>")
"""How user interfaces name an adapter inside a prompt."""
WEIGHT = re.compile(r"\([^()]{1,500}:\s{0,3}-?\d{1,4}(?:\.\d{1,6})?\s{0,3}\)")
"""How they weigh a part of it, as in ``(red:1.4)``."""
SHOWN = 200
"""Most letters of lost words that a message shows."""


def lost_words(tokenizer: Any, text: str) -> str:
    """The words of a text that its encoder does not read, since they lie beyond its window; empty if it reads all."""
    spelt = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    ids = tokenizer(spelt, truncation=False, verbose=False).input_ids
    lost = ids[tokenizer.model_max_length - 1 : -1]  # the last place is that of the end mark
    return tokenizer.decode(lost).strip() if len(ids) > tokenizer.model_max_length else ""


def clip_tokenizers(pipe: Any) -> list[Any]:
    """The tokenizers of a pipeline, if all are CLIP's: an encoder of another kind, such as T5, reads longer prompts."""
    found = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    return found if all(isinstance(part, CLIPTokenizer | CLIPTokenizerFast) for part in found) else []


def check_prompts(option: str, texts: Iterable[str], tokenizer: Any | None, log: Callable[[str], None]) -> None:
    """Log the words of prompts that are cut off; syntax of other programs is refused, since it would be drawn as text.

    Args:
        option: what the prompts were given by.
        tokenizer: of CLIP; ``None`` where prompts are not cut.

    Raises:
        UserError: names the adapter or the weight in a prompt, and what to write in its place.
    """
    for text in dict.fromkeys(texts):
        if tag := LORA_TAG.search(text):
            raise UserError(
                f"{option}: {tag[0]} would be read as words; take it out, and give the adapter as --adapter"
            )
        if weight := WEIGHT.search(text):
            raise UserError(
                f"{option}: {weight[0]} is how other programs weigh words; here it would be read as words, so take the "
                "brackets and the number out"
            )
        if tokenizer is not None and (lost := lost_words(tokenizer, text)):
            log(
                f"{option}: longer than the {tokenizer.model_max_length} tokens that this base reads; "
                f"cut off: {shortened(lost)}"
            )


def caption_notices(captions: Sequence[str], tokenizer: Any | None) -> list[str]:
    """Lines about captions that are cut off, or hold what other programs would read as more than words."""
    lines = []
    for pattern, what in ((LORA_TAG, "name an adapter"), (WEIGHT, "weigh words")):
        found = [match[0] for caption in captions if (match := pattern.search(caption))]
        if found:
            lines.append(f"captions that {what} as other programs do: {len(found)} ({found[0]}); it is read as words")
    letters = max(captions, key=len, default="")  # the longest in letters loses as many words as any, or nearly
    if tokenizer is not None and (lost := lost_words(tokenizer, letters)):
        lines.append(f"the longest caption loses: {shortened(lost)}")
    return lines


def check_negative(negative: str, guidance_scale: float, option: str, log: Callable[[str], None]) -> None:
    """Log that a negative prompt has no effect without guidance (Ho & Salimans 2022: weight 1 is the prompt alone)."""
    if negative and guidance_scale <= 1:
        log(f"{option}: has no effect at a guidance scale of {guidance_scale:g}; it wants more than 1")


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
