"""Options of `sdtune textual-inversion`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from sdtune.config.methods.new_word import NewWord
from sdtune.config.section_base import Natural, NonNegative, Positive, aliases
from sdtune.config.sections import (
    BaseOptions,
    Captions,
    Data,
    Denoising,
    Hub,
    Masks,
    Model,
    Optim,
    Preview,
    Prompts,
    Run,
)


class TextualInversionConfig(
    NewWord, Denoising, BaseOptions, Model, Captions, Masks, Data, Optim, Prompts, Preview, Hub, Run
):
    """A new word for what a few images show; nothing of the base moves (Textual Inversion; Gal et al. 2022)."""

    method: ClassVar[str] = "textual-inversion"
    entry: ClassVar[str] = "sdtune.recipes.textual_inversion:TextualInversion"
    examples: ClassVar[str] = r"""
    sdtune textual-inversion --dataset photos --placeholder-token "<my-cat>"
    sdtune textual-inversion --dataset photos --placeholder-token "<my-cat>" \
        --initializer-token cat --num-vectors 4 --steps 3000
    sdtune textual-inversion --dataset paintings --placeholder-token "<my-style>" \
        --learnable-property style
    """

    placeholder_token: str
    learnable_property: Literal["object", "style"] = "object"
    """Whether the built-in captions name an object or a style. Not used with a caption column or a caption."""
    template_file: Path | None = None
    """File of your own captions, one a line, with {} for the new word. Default: those for learnable_property."""
    norm_weight: NonNegative = 0.0
    """Weight of the squared deviation of the vectors' norm from the vocabulary's mean norm, relative to it."""
    output_dir: Path = Path("runs/textual-inversion")
    learning_rate: Positive = 5e-3
    export_steps: Annotated[Natural, aliases("save_steps")] = 500
