"""What a text encoder does not read of a prompt: words beyond its window, and the syntax of other programs."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTokenizer, CLIPTokenizerFast

from sdtune.config.sections import UserError

LORA_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>")
"""How user interfaces name an adapter inside a prompt."""
WEIGHT = re.compile(r"\(([^()]{1,500}):\s{0,3}(-?\d{1,4}(?:\.\d{1,6})?)\s{0,3}\)")
"""How they weigh a part of it, as in ``(red:1.4)``."""
BRACKETS = re.compile(r"\([^()]{0,500}\)")
SHOWN = 200
"""Most letters of lost words that a message shows."""


class Window(NamedTuple):
    """What a base reads of a text."""

    tokenizer: Any
    """Of the text encoder that reads the most."""
    tokens: int
    """That it reads, marks of begin and end included."""
    way_out: str
    """How to have the rest read; empty where it cannot be."""


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts as pipelines of diffusers read them, uncut, marks of begin and end included."""
    words = list(texts)
    if any(token.endswith("_1") for token in tokenizer.added_tokens_encoder):  # a word of several vectors
        words = TextualInversionLoaderMixin().maybe_convert_prompt(words, tokenizer)
    ids: list[list[int]] = tokenizer(words, truncation=False, verbose=False).input_ids if words else []
    return ids


def lost_words(window: Window, text: str) -> str:
    """The words of a text that its encoder does not read, since they lie beyond its window; empty if it reads all."""
    tokenizer = window.tokenizer
    (ids,) = token_ids(tokenizer, [text])
    marks = int(ids[-1:] == [tokenizer.eos_token_id])  # its place is the last of the window
    lost = ids[window.tokens - marks : len(ids) - marks] if len(ids) > window.tokens else []
    return str(tokenizer.decode(lost)).strip()


def compel_syntax(text: str) -> str:
    """A prompt in the syntax of compel: ``(red:1.4)``, which other programs read, is ``(red)1.4`` there."""
    return _rewritten(text, "({}){}")


def without_weights(text: str) -> str:
    """A prompt whose ``(red:1.4)`` are plain words."""
    return _rewritten(text, "{0}")


def _rewritten(text: str, form: str) -> str:
    """The text with ``form`` of part and weight in the place of each ``(part:weight)``, the inner ones first."""
    hidden = str.maketrans("()", "\ue000\ue001")
    while inner := BRACKETS.search(text):
        weighted = WEIGHT.fullmatch(inner[0])
        new = form.format(*weighted.groups()) if weighted else inner[0]
        text = text[: inner.start()] + new.translate(hidden) + text[inner.end() :]
    return text.translate(str.maketrans("\ue000\ue001", "()"))


def window_of(pipe: Any, tokens: int | None, by_windows: bool) -> Window | None:
    """What a pipeline reads of a prompt: the window of CLIP, or where another encoder reads more, that of the last.

    Args:
        tokens: ``max_sequence_length`` of its call; ``None`` for pipelines without one.
        by_windows: whether --long-prompts is for this pipeline.
    """
    found = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    if not found:
        return None
    if all(isinstance(part, CLIPTokenizer | CLIPTokenizerFast) for part in found):
        return Window(found[0], found[0].model_max_length, "--long-prompts" if by_windows else "")
    return Window(found[-1], tokens, "") if tokens else None


def check_prompts(
    option: str, texts: Iterable[str], window: Window | None, log: Callable[[str], None], weights: bool = False
) -> None:
    """Log the words of prompts that are cut off; syntax of other programs is refused, since it would be drawn as text.

    Args:
        option: what the prompts were given by.
        window: what is read of a prompt; ``None`` where prompts are not cut.
        weights: whether weights are understood.

    Raises:
        UserError: names the adapter or the weight in a prompt, and what to write in its place.
    """
    adapter = ", and give the adapter as --adapter" if option.startswith("--prompt") else ""  # else it is training
    weigh = "" if option == "--class-prompt" else "add --prompt-weights, or "  # which is also a caption
    for text in dict.fromkeys(texts):
        if tag := LORA_TAG.search(text):
            raise UserError(f"{option}: {tag[0]} would be read as words; take it out{adapter}")
        if not weights and (weight := WEIGHT.search(text)):
            raise UserError(
                f"{option}: {weight[0]} is how other programs weigh words; here it would be read as words, so {weigh}"
                "take the brackets and the number out"
            )
        if window and (lost := lost_words(window, without_weights(text) if weights else text)):
            way_out = f" ({window.way_out} reads all)" if window.way_out else ""
            log(
                f"{option}: longer than the {window.tokens} tokens that this base reads; cut off: {shortened(lost)}"
                + way_out
            )


def check_negative(negative: str, guidance_scale: float, option: str, log: Callable[[str], None]) -> None:
    """Log that a negative prompt has no effect without guidance (Ho & Salimans 2022: weight 1 is the prompt alone)."""
    if negative and guidance_scale <= 1:
        log(f"{option}: has no effect at a guidance scale of {guidance_scale:g}; it wants more than 1")


def takes_guidance_as_input(pipe: Any) -> bool:
    """Whether the network of a pipeline is told its guidance; then it is asked once a step, with the prompt alone."""
    unet = pipe.components.get("unet")
    return unet is not None and bool(unet.config.get("time_cond_proj_dim"))


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
