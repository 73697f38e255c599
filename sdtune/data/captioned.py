"""The training items of CLIP: position in the run -> pixels and the tokens of a caption."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdtune.data import Sample, Stream, summarize
from sdtune.data.token_counts import token_counts
from sdtune.run import rng

Position = int | tuple[str, int]
"""A position in the run, or ``("holdout", k)``: the k-th held-out image."""


class CaptionedDataset(Dataset[dict[str, Any]]):
    """Pictures with tokens, all as long as those of the longest caption.

    Args:
        tokenizer: of transformers.
        window: most tokens that the model reads, with the special ones.
        noised: whether items hold ``noise`` like the pixels, and ``u``, uniform in [0, 1), for its strength.
    """

    prompts = ("",)

    def __init__(self, stream: Stream, tokenizer: Any, window: int, noised: bool = False):
        self.stream, self.tokenizer, self.window, self.noised = stream, tokenizer, window, noised
        self.length = window
        if stream.text_cacheable is None:
            self.length = min(window, max(self.count_tokens(stream.texts())))

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in self.tokenizer(list(texts), truncation=False, verbose=False).input_ids]

        return token_counts(self.tokenizer, captions, count)

    def tokens(self, caption: str) -> Tensor:
        """Cut to the window and filled up: ``[L]``."""
        made = self.tokenizer(
            caption, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids: Tensor = made.input_ids[0]
        return ids

    def __getitem__(self, position: Position) -> dict[str, Any]:
        sample: Sample = self.stream[position] if isinstance(position, int) else self.stream.holdout[position[1]]
        pixels = self.stream.pixels(sample)
        item = {"name": sample.name, "pixels": pixels, "tokens": self.tokens(sample.caption)}
        if self.noised:
            draw = partial(rng.generator, self.stream.seed)
            item["noise"] = torch.randn(pixels.shape, generator=draw("noise", position))
            item["u"] = torch.rand((), generator=draw("timestep", position), dtype=torch.float64)
        return item

    @property
    def reads_images(self) -> bool:
        return True

    @property
    def holdout(self) -> list[tuple[str, int]]:
        return [("holdout", k) for k in range(len(self.stream.holdout))]


def captioned_dataset(
    stream: Stream, tokenizer: Any, window: int, log: Callable[[str], None], noised: bool = False
) -> CaptionedDataset:
    """The dataset of CLIP; ``log`` gets each line that the user should read."""
    dataset = CaptionedDataset(stream, tokenizer, window, noised)
    for line in summarize(stream, dataset.count_tokens, window):
        log(line)
    return dataset
