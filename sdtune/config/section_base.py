"""How options are declared: the types of their values, their further names, and the section that groups them.

Nothing here imports torch or anything slow, so that a typing mistake costs a third of a second.
"""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args

from annotated_types import Ge, Gt, Interval
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from sdtune.config.untrusted import PASSWORD, REDACTED, hide_secrets, texts_of

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Levels = Annotated[int, Ge(2)]
"""Values that a pixel can have."""
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Seed = Annotated[int, Interval(ge=-(2**63), lt=2**63)]
"""What torch and NumPy take as a seed."""
Share = Annotated[float, Interval(ge=0, le=1)]
Precision = Annotated[Literal["no", "fp16", "bf16", "fp8"], BeforeValidator(lambda v: "no" if v is False else v)]
"""A bare `no` is false in YAML 1.1."""
DrawingPrecision = Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(lambda v: "no" if v is False else v)]
"""8 bits are for training alone."""
StrList = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
NAMES = r"[\w.]+( ?, ?[\w.]+)+"
"""Names of modules with commas between them."""
NameList = Annotated[StrList, BeforeValidator(lambda v: separate(v))]
"""Names of modules, also as `NAMES`; a regular expression keeps its own commas."""
PathOrId = Annotated[str, BeforeValidator(lambda v: home(v) if isinstance(v, str) else v)]
"""A path of this machine, or something that is no path, such as a Hub id."""
PathOrIds = Annotated[list[PathOrId], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
Counts = Annotated[list[Count], BeforeValidator(lambda v: [v] if isinstance(v, str | int) else v)]


def separate(value: Any) -> Any:
    """Each text of names and commas as names; anything else as it is."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return [name for text in texts for name in (re.findall(r"[\w.]+", text) if re.fullmatch(NAMES, text) else [text])]


def home(path: str) -> str:
    """``~`` and ``~/x`` under the home folder; anything else as it is."""
    return str(Path(path).expanduser()) if path == "~" or path.startswith(("~/", "~\\")) else path


def aliases(*names: str) -> Any:
    """Further names under which a field is accepted, as a flag and as a YAML key."""
    return Field(json_schema_extra={"aliases": list(names)})


def positional(name: str) -> Any:
    """A field that is given by its place on the command line, shown as ``name``, and has no flag."""
    return Field(json_schema_extra={"positional": name})


def requires(option: str, *values: str) -> Any:
    """A field that has no effect unless ``option`` is given, or has one of ``values``."""
    return Field(json_schema_extra={"requires": [option, *values]})


class Description(NamedTuple):
    """What a model card says of a method. Each section of a config fills in the facts that it knows."""

    base: str | None = None
    """Model that the run starts from."""
    revision: str | None = None
    """Branch, tag or commit of the base."""
    trigger: str | None = None
    """What a prompt has to contain to show what was learnt."""
    token: str | None = None
    """New word that has vectors of its own."""
    adapter: str = ""
    """Kind of the adapters, such as LoRA; empty for a method without adapters."""
    rank: int | None = None
    alpha: float | None = None
    clip_skip: int | None = None
    """Layer of the text encoder that prompts are read at, counted from the last; ``None`` for the base's own."""
    long_prompts: bool = False
    """Captions beyond the text encoder's window were read in several windows."""
    tags: tuple[str, ...] = ()
    """Tags of the method on the Hub, for a run whose artefact is a whole pipeline."""


def _both(own: Any, inherited: Any) -> Any:
    """What a field declares of itself and what it inherits; names add up."""
    if not own or not inherited:
        return own or inherited
    names = dict.fromkeys([*own.get("aliases", []), *inherited.get("aliases", [])])
    return inherited | own | ({"aliases": list(names)} if names else {})


def _is_path(annotation: Any) -> bool:
    """Whether a field takes a path, or a list of them."""
    return annotation is Path or any(_is_path(part) for part in get_args(annotation))


def _path(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    if any(ord(character) < 32 for character in str(value)):
        raise ValueError(f"{str(value)!r} holds a tab or a line break; in YAML, put a Windows path in single quotes")
    if "://" in str(value):  # a Path would lose a slash, and with it what says that a password may follow
        raise ValueError(f"{hide_secrets(str(value))} is an address; give a file or folder of this machine")
    return Path(home(str(value)))


class Section(BaseModel):
    """A group of options that belong together; ``--help`` shows each under its section's name."""

    examples: ClassVar[str] = ""
    """Command lines that --help shows first."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        # a class is built when it is first used, and most sections never are
        defer_build=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """A field declared again for another default keeps the further names of the first."""
        for name, field in cls.model_fields.items():
            for base in cls.__mro__[1:]:
                first = base.model_fields.get(name) if issubclass(base, Section) else None
                if first is not None:
                    field.json_schema_extra = _both(field.json_schema_extra, first.json_schema_extra)

    answers: ClassVar[dict[str, str]] = {}
    """Options that other methods have and this one does not, with underscores, to what it says in reply."""
    section_requires: ClassVar[dict[str, str]] = {}
    """Sections whose options have no effect without an option of this class: the section's name, and the option."""

    @classmethod
    @cache
    def requirements(cls, name: str) -> list[tuple[str, list[str]]]:
        """The options without which field ``name`` has no effect, each with the values it may then have, if not all.

        An option that this class has settled for good is not among them.
        """
        extra: Any = cls.model_fields[name].json_schema_extra or {}
        own = extra.get("requires")
        found: list[tuple[str, list[str]]] = [(own[0], own[1:])] if own else []
        for base in cls.__mro__[1:]:
            option = cls.section_requires.get(base.__name__)
            own_names = base.__dict__.get("__annotations__", {})
            if option and name in own_names and name not in cls.__annotations__ and name != option:
                found.append((option, []))
        return [(option, values) for option, values in found if option in cls.model_fields]

    @field_validator("*", mode="before")
    @classmethod
    def _paths(cls, value: Any, info: ValidationInfo) -> Any:
        """In every option that is a path, ``~`` is the home folder, and no character is an escape by mistake."""
        if not _is_path(cls.model_fields[str(info.field_name)].annotation):
            return value
        return [_path(item) for item in value] if isinstance(value, list) else _path(value)

    @model_validator(mode="after")
    def _every_option_has_an_effect(self, info: ValidationInfo) -> Self:
        flags = (info.context or {}).get("flags", ())
        required = [
            (name, field, *needed)
            for name, field in type(self).model_fields.items()
            for needed in type(self).requirements(name)
        ]
        for name, field, option, values in required:
            now, value = getattr(self, option), getattr(self, name)
            changed = value != field.get_default() or (name in flags and not values)
            if value and changed and not (str(now) in values if values else now):
                if values:
                    raise ValueError(f"{name} has no effect with {option} {now}: it is for {' and '.join(values)}")
                raise ValueError(
                    f"{name} has no effect without {option}: add --{option.replace('_', '-')}, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        """What is given here is written to the run's folder, and may be published."""
        for name in type(self).model_fields:
            for text in texts_of(getattr(self, name)):
                if PASSWORD.search(text):
                    raise ValueError(
                        f"{name} holds a password, which would stand in the run's records; put it in ~/.netrc"
                    )
                if "://" in text and f"={REDACTED}" in text:
                    raise ValueError(f"{name}: its signature was left out of the record; give the whole address again")
        return self

    def describe(self) -> Description:
        """The facts for a model card. A section adds its own to those of ``super().describe()``."""
        return Description()
