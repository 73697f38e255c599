"""Options of a word that gets vectors of its own, which two methods share."""

from typing import Annotated, Self

from pydantic import model_validator

from sdtune.config.section_base import Count, Description, StrList, requires
from sdtune.config.sections import Prompts


def says(text: str, word: str) -> bool:
    """Whether a tokenizer that knows ``word`` finds it in ``text``: in any case, and beside a comma or full stop."""
    return word.lower() in text.lower()


class NewWord(Prompts):
    """The word that gets vectors of its own."""

    placeholder_token: str | None = None
    """New word for what is learnt, such as <my-cat>. Captions must contain it. Without it, no word is added."""
    initializer_token: StrList = []
    """Words whose vectors the new ones start from: one for all, or one each. Default: the vocabulary's mean."""
    initializer_mean: Annotated[bool, requires("initializer_token")] = False
    """Start every vector at the mean of all initializer words, which may then have several tokens."""
    num_vectors: Count = 1
    """Vectors of the new word. More of them can hold more detail, and use more of the prompt's tokens."""

    @model_validator(mode="after")
    def _a_word_that_is_shown(self) -> Self:
        word = self.placeholder_token
        if word is not None and word.split() != [word]:
            raise ValueError(f"placeholder_token {word!r}: wants one word, such as <my-cat>")
        if word and self.validation_prompt and not any(says(prompt, word) for prompt in self.validation_prompt):
            raise ValueError(f"validation_prompt: none says {word}, so no sample would show it; put it into one")
        return self

    def describe(self) -> Description:
        known, word = super().describe(), self.placeholder_token
        return known._replace(token=word, trigger=word or known.trigger)
