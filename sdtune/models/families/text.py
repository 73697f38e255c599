"""The text of base models: what the denoiser is told of captions, and how much of them is read.

Captions are templated, cut into tokens and encoded by the stock pipeline's own ``encode_prompt``; with
``--long-prompts`` they are read window by window (``models.prompt_embeddings``).
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from torch import Tensor, nn

from sdtune.config.fields import flag
from sdtune.config.sections import UserError
from sdtune.data.token_counts import token_counts
from sdtune.models.families.parts import ModelParts, tokenizer_of
from sdtune.models.prompt_embeddings import TextParts, embed
from sdtune.models.prompts import Window, lost_words, token_ids


class TextFamily(ModelParts):
    """The part of a family that reads text.

    Args:
        cfg: a config with the sections Model, TextEncoding and BaseOptions; the others are those of ``ModelParts``.
    """

    max_tokens: ClassVar[int | None] = None
    """``max_sequence_length`` of the stock call; ``None`` for pipelines without one."""
    encode_options: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}
    """Arguments of ``encode_prompt`` that leave the negative prompt out."""
    prompt_arguments: ClassVar[tuple[str, ...]] = ("prompt",)
    """Arguments of ``encode_prompt`` that take the captions."""
    reads_windows: ClassVar[bool] = False
    """Whether ``window_tensors`` is there, so that longer texts can be read window by window, and weighed."""

    # ---- what a family says ----------------------------------------------------------------------------

    def text_tensors(self, encoded: Any) -> dict[str, Tensor]:
        """Names what ``encode_prompt`` returned, each ``[B, ...]``; ``mask`` bool ``[B, L]`` where lengths differ."""
        raise NotImplementedError

    @classmethod
    def window_tensors(cls, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """What the denoiser is told of windows of text, ``[W, ...]`` by name, from the outputs of the text encoders."""
        raise NotImplementedError

    def text_shapes(self, captions: int) -> dict[str, Tensor] | None:
        """What ``encode`` gives, as shapes without values; ``None`` where the encoders can be traced without values."""
        return None

    # ---- what captions become --------------------------------------------------------------------------

    @classmethod
    def check_reading(cls, cfg: Any, pipeline: str) -> None:
        """Refuse what prompts cannot be read by.

        Args:
            cfg: a config with the section TextEncoding.
            pipeline: class of the pipeline, which no family may know.

        Raises:
            UserError: names the option.
        """
        known = pipeline == cls.pipeline_class.__name__
        asked = [name for name in ("long_prompts", "prompt_weights") if getattr(cfg, name)]
        if asked and not (known and cls.reads_windows):
            raise UserError(f"{flag(asked[0])}: a {pipeline} reads prompts in its own way; leave it out")
        layer = cls.clip_layer if known else None
        if cfg.clip_skip is not None and layer != 1:
            own = f"always reads its CLIP at layer {layer}, counted from the last" if layer else "has no such choice"
            raise UserError(f"--clip-skip {cfg.clip_skip}: a {pipeline} {own}; leave it out")

    @property
    def sequence_length(self) -> int | None:
        """``max_sequence_length`` of the stock call, which ``--max-sequence-length`` changes."""
        return self.cfg.max_sequence_length or self.max_tokens

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser is told of captions, by name, each ``[B, ...]``."""
        if not self.has_values and (shapes := self.text_shapes(len(captions))):
            return shapes
        if self.cfg.long_prompts:
            found = embed(self.text_parts(self.part, self.tokenizers.get), captions)
            more = {name: torch.stack([row[name] for row in found]) for name in found[0] if name != "embeds"}
            return pad(row["embeds"] for row in found) | more
        parts = dict.fromkeys(("vae", "scheduler")) | {self.denoiser_name: self.denoiser}
        length = {"max_sequence_length": self.sequence_length} if self.sequence_length else {}
        prompts = {name: list(captions) for name in self.prompt_arguments}
        pipe = self.pipeline(**parts)
        return self.text_tensors(pipe.encode_prompt(**prompts, device=self.device, **self.encode_options, **length))

    @classmethod
    def text_parts(cls, part: Callable[[str], Any], tokenizer: Callable[[str], Any]) -> TextParts:
        """The text encoders by their names, of a base or of a pipeline."""
        return TextParts(
            [part(name) for name in cls.encoders],
            [tokenizer(tokenizer_of(name)) for name in cls.encoders],
            cls.window_tensors,
        )

    def no_text(self) -> dict[str, Tensor]:
        """What the denoiser is told where guidance has no prompt, each ``[1, ...]``."""
        return self.encode([""])

    def conditioning(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the denoiser is told: cached text, or that of the captions, and the size where it is asked for."""
        cached = {name.removeprefix("text."): x for name, x in batch.items() if name.startswith("text.")}
        size = {"size": batch["size"]} if self.conditions_on_size else {}
        return (cached or self.encode(batch["caption"])) | size

    def text_key(self) -> str:
        """Names all that ``encode`` depends on but the caption."""
        versions = f"{diffusers.__version__} {transformers.__version__}"
        sha = hashlib.sha256(f"{self.pipeline_class.__name__} {versions} {self.sequence_length}".encode())
        if self.cfg.long_prompts:
            sha.update(b" in windows")
        for name, tokenizer in sorted(self.tokenizers.items()):
            sha.update(f"{name} {tokenizer.backend_tokenizer.to_str()} {tokenizer.chat_template}".encode())
        for name in self.encoders:
            sha.update(self.weights_key(name).encode())
        return sha.hexdigest()[:24]

    @property
    def window(self) -> Window | None:
        """What is read of a caption or prompt; ``None`` where all of it is."""
        if self.cfg.long_prompts:
            return None
        tokenizer = self.tokenizers[tokenizer_of(self.encoders[-1])]
        if self.sequence_length and "CLIP" not in self.part_class(self.encoders[-1]).__name__:
            return Window(tokenizer, self.sequence_length, "a larger --max-sequence-length")
        return Window(tokenizer, tokenizer.model_max_length, "--long-prompts" if self.reads_windows else "")

    @property
    def caption_window(self) -> int:
        """The most tokens of a caption that are read, marks of begin and end included."""
        return self.window.tokens if self.window else sys.maxsize

    @property
    def longer_captions(self) -> str:
        """The option that reads captions beyond the window; empty if there is none."""
        return self.window.way_out if self.window else ""

    def lost_words(self, caption: str) -> str:
        """The words of a caption that lie beyond the window."""
        return lost_words(self.window, caption) if self.window else ""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Lengths of captions in the tokens of the last text encoder, marks of begin and end included."""
        tokenizer = self.tokenizers[tokenizer_of(self.encoders[-1])]
        return token_counts(tokenizer, captions, lambda texts: [len(ids) for ids in token_ids(tokenizer, texts)])


def unpad(embeds: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows of ``embeds`` ``[B, L, D]`` that ``mask`` ``[B, L]`` marks, a tensor for each caption."""
    return [e[m] for e, m in zip(embeds, mask.bool(), strict=True)]


def pad(embeds: Iterable[Tensor]) -> dict[str, Tensor]:
    """Embeddings of captions of differing lengths as one tensor ``[B, L, D]``, and the mask ``[B, L]`` of it."""
    rows = list(embeds)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return {"embeds": padded, "mask": torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]}
