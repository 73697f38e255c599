"""The training items of CLIP: position in the run -> pixels and the tokens of a caption."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from sdtune.data import Sample, Stream, summarize

Position = int | tuple[str, int]
"""A position in the run, or ``("holdout", k)``: the k-th held-out image."""


class CaptionedDataset(Dataset[dict[str, Any]]):
    """Pictures with tokens, all as long as those of the longest caption.

    Args:
        tokenizer: of transformers.
        window: most tokens that the model reads, with the special ones.
    """

    prompts = ("",)

    def __init__(self, stream: Stream, tokenizer: Any, window: int):
        self.stream, self.tokenizer, self.window = stream, tokenizer, window
        self.length = window
        if stream.text_cacheable is None:
            self.length = min(window, max(self.count_tokens(stream.texts())))

    def count_tokens(self, captions: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False).input_ids]

    def tokens(self, caption: str) -> Tensor:
        """Cut to the window and filled up: ``[L]``."""
        made = self.tokenizer(
            caption, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        ids: Tensor = made.input_ids[0]
        return ids

    def __getitem__(self, position: Position) -> dict[str, Any]:
        sample: Sample = self.stream[position] if isinstance(position, int) else self.stream.holdout[position[1]]
        return {"name": sample.name, "pixels": self.stream.pixels(sample), "tokens": self.tokens(sample.caption)}

    @property
    def reads_images(self) -> bool:
        return True

    @property
    def holdout(self) -> list[tuple[str, int]]:
        return [("holdout", k) for k in range(len(self.stream.holdout))]


def captioned_dataset(stream: Stream, tokenizer: Any, window: int, log: Callable[[str], None]) -> CaptionedDataset:
    """The dataset of CLIP; ``log`` gets each line that the user should read."""
    dataset = CaptionedDataset(stream, tokenizer, window)
    for line in summarize(stream, dataset.count_tokens, window):
        log(line)
    return dataset
