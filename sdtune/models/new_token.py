"""New words for a text encoder: rows of its embedding that train, beside a table that cannot (Gal et al. 2022).

A word of several vectors is several tokens, ``<cat> <cat>_1 <cat>_2``, which diffusers puts in place of ``<cat>``
wherever a prompt says it. In a base of several text encoders each has vectors of its own for the word.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from sdtune.config.methods.new_word import NewWord, says
from sdtune.config.sections import UserError
from sdtune.data import Images


class Embedding(nn.Module):
    """A token embedding whose first rows are frozen and whose last rows, ``rows`` ``[n, dim]`` in fp32, train.

    The old rows are not among the trained parameters, so no weight decay, momentum or rounding can change them.
    """

    def __init__(self, table: "nn.Embedding | Embedding", size: int, start: Tensor):
        super().__init__()
        # a table with the rows of another new word, which train
        self.table = table if isinstance(table, Embedding) else table.requires_grad_(False)
        self.size = size
        self.rows = nn.Parameter(start.detach().float().clone())
        norm = table.weight[:size].detach().float().norm(dim=1).mean()
        self.register_buffer("usual_norm", norm, persistent=False)  # mean norm of the old rows

    @property
    def weight(self) -> Tensor:
        """All rows as one table, for code that reads its dtype, device or norms."""
        return torch.cat([self.table.weight[: self.size], self.rows.to(self.table.weight.dtype)])

    def norms(self) -> Tensor:
        """The norm of each row that trains, ``[n]``; where processes hold a slice each (FSDP2), all must call this."""
        rows = self.rows.full_tensor() if isinstance(self.rows, DTensor) else self.rows
        return rows.norm(dim=1)

    def forward(self, ids: Tensor) -> Tensor:
        old = self.table(ids.clamp(max=self.size - 1))
        new = functional.embedding((ids - self.size).clamp(min=0), self.rows).to(old.dtype)
        return torch.where((ids >= self.size)[..., None], new, old)


class Word(NamedTuple):
    """A new word in the text encoders that learn it, by their names."""

    token: str
    embeddings: dict[str, Embedding]

    @property
    def rows(self) -> dict[str, nn.Parameter]:
        """Its vectors, ``[n, dim]`` for each text encoder."""
        return {name: embedding.rows for name, embedding in self.embeddings.items()}

    def figures(self, images: int) -> dict[str, Tensor]:
        """The mean norm of the new rows, for the metrics: one that runs away drowns the other words."""
        return {
            f"embedding_norm{name.removeprefix('text_encoder')}": embedding.norms().detach().mean().expand(images)
            for name, embedding in self.embeddings.items()
        }

    def deviation(self) -> Tensor:
        """Mean square of the deviation of the norms from the vocabulary's, relative to it, over all encoders."""
        squares = [((e.norms() / e.usual_norm) - 1).square().mean() for e in self.embeddings.values()]
        return torch.stack(squares).mean()


def spelling(word: str, vectors: int) -> list[str]:
    """The tokens of a word of several vectors, as diffusers names them."""
    return [word, *(f"{word}_{k}" for k in range(1, vectors))]


def start_vectors(cfg: NewWord, tokenizers: Mapping[str, Any], encoders: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where the vectors of ``cfg.placeholder_token`` start in each text encoder, ``[num_vectors, dim]``.

    Every mistake in the word is reported here, so that it is reported before anything that takes long.

    Args:
        tokenizers: that of each text encoder, by the encoder's name.

    Raises:
        UserError: the base knows the word already, or nothing to start from is there.
    """
    assert cfg.placeholder_token is not None
    for tokenizer in tokenizers.values():
        refuse_known(tokenizer, cfg.placeholder_token, cfg.num_vectors)
    return {
        name: starting_rows(tokenizers[name], encoder, cfg.initializer_token, cfg.num_vectors, cfg.initializer_mean)
        for name, encoder in encoders.items()
    }


def starts_of_words(
    words: Sequence[str], beginnings: Sequence[str], tokenizers: Mapping[str, Any], encoders: Mapping[str, Any]
) -> list[dict[str, Tensor]]:
    """Where the vector of each of several words starts in each text encoder, ``[1, dim]``: as `start_vectors`.

    Args:
        beginnings: known words to start from, one for all or one for each; none is the mean of the vocabulary.
    """
    for word in words:
        for tokenizer in tokenizers.values():
            refuse_known(tokenizer, word, 1)
    of_each = [beginnings[k : k + 1] for k in range(len(words))] if len(beginnings) > 1 else [beginnings] * len(words)
    return [
        {name: starting_rows(tokenizers[name], encoder, own, 1, mean=False) for name, encoder in encoders.items()}
        for own in of_each
    ]


def require_word(word: str, images: Images) -> Images:
    """The images, if every caption has ``word`` in it.

    Raises:
        UserError: names those that do not; an image whose caption leaves the word out teaches it nothing.
    """
    return require_one_of([word], images)


def require_one_of(words: Sequence[str], images: Images) -> Images:
    """The images, if every caption has one of ``words`` in it. Raises: UserError that names those that do not."""
    silent = [row.name for row in images.rows if not all(any(says(c, word) for word in words) for c in row.captions)]
    if silent:
        which = "one of them" if len(words) > 1 else "it"
        raise UserError(
            f"--placeholder-token {' '.join(words)}: {len(silent)} of {len(images.rows)} captions do not say {which} "
            f"({', '.join(silent[:5])}{', ...' if len(silent) > 5 else ''}); put it in"
        )
    return images


def refuse_known(tokenizer: Any, word: str, vectors: int) -> None:
    """Raises: UserError where the base knows one of the tokens of ``word``, in whatever case it writes it."""
    known = tokenizer.get_vocab().keys()
    tokens = spelling(word, vectors)
    if taken := [token for token in tokens if token.lower() in known or len(tokenizer.tokenize(token)) < 2]:
        raise UserError(
            f"--placeholder-token {word}: {taken[0]} is in the base's vocabulary; choose a word of your own, such as "
            f"<my-{word.strip('<>')}>"
        )


def add_word(
    word: str, tokenizers: Mapping[str, Any], encoders: Mapping[str, Any], starts: Mapping[str, Tensor]
) -> Word:
    """Add ``word`` to each text encoder and its tokenizer, by the encoders' names; its vectors train."""
    embeddings = {name: add_token(tokenizers[name], encoder, word, starts[name]) for name, encoder in encoders.items()}
    return Word(word, embeddings)


def add_token(tokenizer: Any, text_encoder: Any, word: str, start: Tensor) -> Embedding:
    """Add ``word`` to tokenizer and text encoder; its vectors start at ``start`` ``[n, dim]``, and train."""
    size = len(tokenizer)
    tokenizer.add_tokens(spelling(word, len(start)))
    embedding = Embedding(text_encoder.get_input_embeddings(), size, start)
    text_encoder.set_input_embeddings(embedding)
    return embedding


def starting_rows(tokenizer: Any, text_encoder: Any, words: Sequence[str], vectors: int, mean: bool) -> Tensor:
    """Where the vectors of a new word start, ``[vectors, dim]``: at the rows of known words.

    Args:
        words: one for all vectors, or one for each; none is the mean of the vocabulary.
        mean: each vector begins at the mean of the rows of all ``words``, which may be of several tokens.

    Raises:
        UserError: a word of several tokens, where one is meant, or as many words as fit nothing.
    """
    table = text_encoder.get_input_embeddings().weight.detach().float()
    if not words:
        return table[: len(tokenizer)].mean(0).expand(vectors, -1)
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    if mean:
        return table[[i for word in ids for i in word]].mean(0).expand(vectors, -1)
    for word, tokens in zip(words, ids, strict=True):
        if len(tokens) != 1:
            parts = " ".join(tokenizer.convert_ids_to_tokens(tokens)) or "nothing"
            raise UserError(
                f"--initializer-token {word}: is {len(tokens)} tokens of this base ({parts}), not one; choose another "
                "word, or start at the mean of them with --initializer-mean"
            )
    if len(words) not in (1, vectors):
        raise UserError(f"--initializer-token: {len(words)} words for {vectors} vectors; give one, or one for each")
    rows = table[[tokens[0] for tokens in ids]]
    return rows if len(words) == vectors else rows.expand(vectors, -1)
