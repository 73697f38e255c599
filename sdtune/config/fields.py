"""What a config class declares of each option: its section, its names, what it takes, its help."""

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from sdtune.config import docstrings
from sdtune.config.section_base import Section

FIRST = (
    "Data",
    "Source",
    "Model",
    "Run",
    "Captions",
    "Cache",
    "Classes",
    "Adapter",
    "Prompts",
    "Preview",
    "Optim",
    "Hub",
)
"""Sections that --help shows first, after the options that are the command's own."""


def by_section(config: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """The fields of ``config``: the command's own, the sections that most people need, and the others."""
    sections = [c.__name__ for c in config.__mro__]
    own = [name for name in sections if name.endswith("Config")]
    order = [*own, *FIRST, *sections]
    yield from sorted(config.model_fields.items(), key=lambda item: order.index(section_of(config, item[0])))


def section_of(config: type[Section], name: str) -> str:
    """The section that first declares field ``name``."""
    return [c.__name__ for c in config.__mro__ if name in c.__dict__.get("__annotations__", {})][-1]


def title_of(config: type[Section], name: str) -> str:
    """What that section is called where options are listed: ``NewWord`` is "New word", a command's own its name."""
    section = section_of(config, name)
    if section.endswith("Config"):
        return str(config.method)  # type: ignore[attr-defined]
    words = re.findall(r"[A-Z][^A-Z]*", section)
    return " ".join(words[:1] + [word.lower() for word in words[1:]])


def declared(field: FieldInfo, key: str) -> Any:
    """What ``aliases`` or ``positional`` said of a field; nothing if it was not said."""
    extra = field.json_schema_extra
    return extra.get(key) if isinstance(extra, dict) else None


def aliases_of(field: FieldInfo) -> list[str]:
    """The further names under which a field is accepted."""
    return list(declared(field, "aliases") or [])


def names_of(config: type[Section]) -> dict[str, str]:
    """Every accepted spelling, with underscores, to its field."""
    fields = config.model_fields.items()
    return {spelling: name for name, field in fields for spelling in (name, *aliases_of(field))}


def command_of(config: type[Section]) -> str | None:
    """The command whose settings these are, `method` in their file; none where that is an option (as of merge)."""
    return None if "method" in names_of(config) else getattr(config, "method", None)


def positional(field: FieldInfo) -> str:
    """The name under which a field is given by its place, or nothing for one that is a flag."""
    return str(declared(field, "positional") or "")


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def written(config: type[Section], name: str) -> str:
    """How a person writes a field on the command line."""
    return positional(config.model_fields[name]) or flag(name)


def inner_type(annotation: Any) -> Any:
    """The type behind ``Annotated`` and ``| None``."""
    if get_origin(annotation) is typing.Annotated:
        return inner_type(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return inner_type(next(a for a in get_args(annotation) if a is not type(None)))
    return annotation


def is_list(field: FieldInfo) -> bool:
    return get_origin(inner_type(field.annotation)) is list


def is_mapping(field: FieldInfo) -> bool:
    return get_origin(inner_type(field.annotation)) is dict


def item_type(field: FieldInfo) -> Any:
    """The type of a field, or of the items of its list."""
    kind = inner_type(field.annotation)
    return inner_type(get_args(kind)[0]) if get_origin(kind) is list else kind


def takes_text(field: FieldInfo) -> bool:
    """Whether any text is a value of the field, or one of a few words."""
    kind = item_type(field)
    return kind in (str, Path) or get_origin(kind) is Literal


def takes_number(field: FieldInfo) -> bool:
    return item_type(field) in (int, float)


def metavar(field: FieldInfo) -> str:
    """What --help shows as the value of a flag; nothing for a switch."""
    kind = item_type(field)
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    known = {bool: "", int: "INTEGER", float: "NUMBER", Path: "PATH"}
    return known.get(kind, "YAML" if get_origin(kind) is dict else "TEXT")


def description(config: type[Section], name: str) -> str:
    """What a field does: the docstring under it."""
    return config.model_fields[name].description or docstrings.of_field(config, name)


def help_of(config: type[Section], name: str) -> str:
    """The description with the default; what happens without an option that has none, the description itself says."""
    text, field = description(config, name), config.model_fields[name]
    if field.is_required():
        return f"{text} Required."
    default = field.get_default()
    if default in (None, False, "", [], {}):
        return text
    if isinstance(default, list):
        default = " ".join(map(str, default))
    shown = f"{default:g}" if isinstance(default, float) else "on" if default is True else default
    return f"{text} Default: {shown}."
