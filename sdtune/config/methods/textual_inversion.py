"""Options of `sdtune textual-inversion`."""

from pathlib import Path
from typing import ClassVar, Literal

from sdtune.config.methods.new_word import NewWord
from sdtune.config.sections import (
    Captions,
    Data,
    Denoising,
    Hub,
    Model,
    Natural,
    NonNegative,
    Optim,
    Positive,
    Preview,
    Prompts,
    Run,
)


class TextualInversionConfig(NewWord, Denoising, Model, Captions, Data, Optim, Prompts, Preview, Hub, Run):
    """A new word for what a few images show; nothing of the base moves (Textual Inversion; Gal et al. 2022)."""

    method: ClassVar[str] = "textual-inversion"
    entry: ClassVar[str] = "sdtune.recipes.textual_inversion:TextualInversion"

    placeholder_token: str
    learnable_property: Literal["object", "style"] = "object"
    """Whether the captions that the templates make name a thing or a style; a caption column or a caption wins."""
    template_file: Path | None = None
    """Captions of your own, one a line, with {} where the new word goes; none is those for learnable_property."""
    norm_weight: NonNegative = 0.0
    """Weight of the squared deviation of the vectors' norm from the vocabulary's mean norm, relative to it."""
    output_dir: Path = Path("runs/textual-inversion")
    learning_rate: Positive = 5e-3
    export_steps: Natural = 500
