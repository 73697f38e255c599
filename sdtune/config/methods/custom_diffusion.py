"""Options of `sdtune custom-diffusion`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from sdtune.config.methods.new_word import says
from sdtune.config.methods.prior import Prior
from sdtune.config.section_base import Description, PathOrId, Positive, StrList, aliases, requires
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


def several(value: Any) -> Any:
    """Words with ``+`` between them, as diffusers' script takes them, or as they are."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return [word.strip() for text in texts for word in text.split("+") if word.strip()]


Words = Annotated[StrList, BeforeValidator(several)]


class CustomDiffusionConfig(
    Prior, Denoising, BaseOptions, Model, Captions, Masks, Data, Optim, Prompts, Preview, Hub, Run
):
    """One or several subjects, each a new word, in what reads the text (Custom Diffusion; Kumari et al. 2023)."""

    method: ClassVar[str] = "custom-diffusion"
    entry: ClassVar[str] = "sdtune.recipes.custom_diffusion:CustomDiffusion"
    examples: ClassVar[str] = r"""
    sdtune custom-diffusion --config custom-diffusion/tiny-word --steps 20
    sdtune custom-diffusion --dataset photos --instance-prompt "a photo of a <new1> dog" \
        --placeholder-token "<new1>" --initializer-token dog
    sdtune custom-diffusion --concepts-list concepts.json --placeholder-token "<new1>" "<new2>" \
        --prior-preservation
    """

    dataset: Annotated[PathOrId, aliases("instance_data", "instance_data_dir", "concepts_list")]
    """Images of the subject: folder, Hub id, saved dataset; or a .json file that lists several subjects."""
    instance_prompt: str | None = None
    """Caption of images without one of their own, such as a photo of a <new1> dog. Default: each image needs one."""
    placeholder_token: Annotated[Words, aliases("modifier_token")] = []
    """New words, one for each subject, such as <new1> <new2>. Leave out to train no word."""
    initializer_token: Annotated[Words, requires("placeholder_token")] = []
    """Words whose vectors the new ones start from: one for all, or one each. Default: the vocabulary's mean."""
    placeholder_lr: Annotated[Positive | None, requires("placeholder_token")] = None
    """Learning rate of the new words' vectors. Default: learning_rate."""
    trained_attention: Annotated[Literal["crossattn_kv", "crossattn"], aliases("freeze_model")] = "crossattn_kv"
    """What trains of the cross-attention: keys and values, or (crossattn) queries and outputs as well."""
    random_flip: Annotated[bool, aliases("hflip")] = False
    learning_rate: Positive = 1e-5
    output_dir: Path = Path("runs/custom-diffusion")

    @property
    def concepts_file(self) -> Path | None:
        """The file that lists several subjects, if there is one."""
        return Path(self.dataset) if self.dataset.endswith(".json") else None

    @model_validator(mode="after")
    def _subjects_and_their_classes(self) -> Self:
        if self.concepts_file is None:
            self.check_class()
            return self
        given = {
            "instance_prompt": self.instance_prompt,
            "caption": self.caption,
            "class_prompt": self.class_prompt,
            "class_data": self.class_data,
        }
        if named := [name for name, value in given.items() if value]:
            raise ValueError(f"{named[0]}: {self.dataset} says it for each subject; leave the option out")
        if self.buckets:
            raise ValueError("buckets with several subjects: a batch has one shape, and they take turns; leave it out")
        return self

    @model_validator(mode="after")
    def _new_words(self) -> Self:
        words, starts = self.placeholder_token, self.initializer_token
        if odd := [word for word in words if word.split() != [word]]:
            raise ValueError(f"placeholder_token {odd[0]!r}: wants one word, such as <new1>")
        if same := [word for word in words if sum(says(other, word) for other in words) > 1]:
            raise ValueError(f"placeholder_token: {same[0]} is there twice, or in another of the words")
        if len(starts) not in (0, 1) and len(starts) != len(words):
            raise ValueError(f"initializer_token: {len(starts)} words for {len(words)} new ones; give one, or one each")
        if words and self.instance_prompt and not any(says(self.instance_prompt, word) for word in words):
            raise ValueError(f"instance_prompt does not say {words[0]}, so the new word would not train; put it in")
        if named := [word for word in words if any(says(prompt, word) for prompt in self.class_prompt)]:
            raise ValueError(f"class_prompt says {named[0]}, which the base does not know; name the class alone")
        shown = self.validation_prompt
        if words and shown and not any(says(prompt, word) for prompt in shown for word in words):
            raise ValueError(f"validation_prompt: none says {words[0]}, so no sample would show it; put it into one")
        return self

    def describe(self) -> Description:
        known, words = super().describe(), self.placeholder_token
        trigger = self.instance_prompt or " ".join(words) or known.trigger
        return known._replace(token=words[0] if len(words) == 1 else None, trigger=trigger)
