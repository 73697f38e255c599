"""Between a config class and the text a person writes: flags, YAML, help, and every mistake in user words."""

import difflib
import re
import shlex
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from sdtune.config.foreign_flags import NEEDLESS
from sdtune.config.sections import Run, Section, UserError

LAUNCH = ("num_processes", "accelerate_config", "find_batch_size", "memory", "overwrite", "allow_change")
"""Flags of the commands that train which describe the launch, so they are no fields."""


# ---- what a config class declares --------------------------------------------------------------------


def by_section(config: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """The fields of ``config``, the method's own first, then section by section."""
    sections = [c.__name__ for c in config.__mro__]
    yield from sorted(config.model_fields.items(), key=lambda item: sections.index(section_of(config, item[0])))


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


def other_names(field: FieldInfo) -> list[str]:
    extra = field.json_schema_extra
    return list(extra["also"]) if isinstance(extra, dict) and "also" in extra else []  # type: ignore[arg-type]


def names_of(config: type[Section]) -> dict[str, str]:
    """Every accepted spelling, with underscores, to its field."""
    fields = config.model_fields.items()
    return {spelling: name for name, field in fields for spelling in (name, *other_names(field))}


def command_of(config: type[Section]) -> str | None:
    """The command whose settings these are, `method` in their file; none where that is an option (as of merge)."""
    return None if "method" in names_of(config) else getattr(config, "method", None)


def positional(field: FieldInfo) -> str:
    """The name under which a field is given by its place, or nothing for one that is a flag."""
    extra = field.json_schema_extra
    return str(extra.get("positional", "")) if isinstance(extra, dict) else ""


def spelt(config: type[Section], name: str) -> str:
    """How a person writes a field on the command line."""
    return positional(config.model_fields[name]) or flag(name)


def bare(annotation: Any) -> Any:
    """The type behind ``Annotated`` and ``| None``."""
    if get_origin(annotation) is typing.Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return bare(next(a for a in get_args(annotation) if a is not type(None)))
    return annotation


def is_list(field: FieldInfo) -> bool:
    return get_origin(bare(field.annotation)) is list


def metavar(field: FieldInfo) -> str:
    kind = bare(field.annotation)
    if get_origin(kind) is list:
        kind = bare(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "YAML" if get_origin(kind) is dict else "TEXT")


def help_of(field: FieldInfo) -> str:
    """The description with the default; what None stands for is told by the description itself."""
    text = field.description or ""
    if field.is_required():
        return f"{text} (required)"
    default = field.get_default()
    if default in (None, "", [], {}):
        return text
    if isinstance(default, list):
        default = " ".join(map(str, default))
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"{text} (default {str(shown).lower() if isinstance(default, bool) else shown})"


# ---- from text to a config ---------------------------------------------------------------------------


def resolve(config: type[Section], file: str | None, flags: Mapping[str, Any], unknown: list[str]) -> Any:
    """Merge defaults < YAML < flags and validate; ``UserError`` lists every problem.

    Args:
        flags: field name to the text of its flag, those given on the command line only.
        unknown: words of the command line that are no flag of this command.
    """
    problems = list(unknown_flags(config, unknown))
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if file is not None:
        path, known, command = config_file(file), names_of(config), command_of(config)
        for key, value, line in read_yaml(path):
            name = known.get(key.replace("-", "_"))
            if key == "method" and command:
                if value != command:
                    raise UserError(
                        f"{path}:{line}: method: these are the settings of `sdtune {value}`, not of `sdtune {command}`"
                    )
            elif name is None:
                problems.append(f"{path}:{line}: unknown key {key}{advice(config, key, dash='')}")
            elif name in origin:
                problems.append(f"{path}:{line}: {key}: given twice")
            else:
                values[name], origin[name] = value, f"{path}:{line}: {key}"
    for name, value in flags.items():
        values[name] = (
            from_yaml_text(value) if get_origin(bare(config.model_fields[name].annotation)) is dict else value
        )
        origin[name] = spelt(config, name)
    for name, value in list(values.items()):
        if isinstance(value, bool) and bare(config.model_fields[name].annotation) in (int, float):  # true would be 1
            problems.append(f"{origin[name]}: wants a number, not {values.pop(name)}")
    try:
        cfg = config.model_validate(values)
    except ValidationError as error:
        problems += [
            f"{origin.get(where) or spelt(config, where)}: {message}" if where else message
            for where, message in told(error)
        ]
        raise UserError("\n       ".join(problems)) from None
    if problems:
        raise UserError("\n       ".join(problems))
    return cfg


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def unknown_flags(config: type[Section], words: list[str]) -> Iterator[str]:
    after_flag = False
    for word in words:
        if word.startswith("-"):
            given = word.partition("=")[0]
            yield f"{given}: no such option{advice(config, given.lstrip('-'), dash='--')}"
        elif not after_flag:
            yield f"{word}: unexpected argument; options start with --"
        after_flag = word.startswith("-") and "=" not in word


def advice(config: type[Section], name: str, dash: str) -> str:
    """What to write in place of an unknown name."""
    name = name.replace("-", "_")
    if name in NEEDLESS:
        return f"; {NEEDLESS[name]}"
    known = [
        *names_of(config),
        *(["config", "dry_run"] if dash else []),
        *(LAUNCH if dash and issubclass(config, Run) else []),
    ]
    close = difflib.get_close_matches(name, known, n=1)
    spelt = close[0].replace("_", "-") if dash and close else "".join(close)
    return f"; did you mean {dash}{spelt}?" if close else "; --help lists them"


def told(error: ValidationError) -> Iterator[tuple[str, str]]:
    """(field, what is wrong in user words) of each problem; field is empty for rules between fields."""
    for e in error.errors():
        where = str(e["loc"][0]) if e["loc"] else ""
        given, limits = e["input"], e.get("ctx", {})
        match e["type"]:
            case "missing":
                yield where, "is required"
            case "int_parsing" | "int_type" | "int_from_float":
                yield where, f"wants a whole number, not {given!r}"
            case "float_parsing" | "float_type" | "finite_number":
                yield where, f"wants a number, not {given!r}"
            case "bool_parsing" | "bool_type":
                yield where, f"wants true or false, not {given!r}"
            case "literal_error":
                choices = [c.strip("'") for c in re.findall(r"'[^']*'", str(limits["expected"]))]
                close = difflib.get_close_matches(str(given), choices, n=1)
                yield (
                    where,
                    f"{given!r} is none of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else ""),
                )
            case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
                yield where, f"{e['msg'].removeprefix('Input ')}, not {given}"
            case "value_error":
                yield where, str(limits["error"])
            case _:
                yield where, f"{e['msg'].removeprefix('Input ')}, not {given!r}"


def canonical(config: type[Section], words: list[str]) -> list[str]:
    """The command line with each flag under its field's name and each list spelt out.

    ``--dataset_name d`` becomes ``--dataset d``, and ``--validation-prompt a b``, as argparse's nargs="+" takes it,
    becomes ``--validation-prompt a --validation-prompt b``.

    Raises:
        UserError: a flag stands where the value of another is due.
    """
    known = names_of(config)
    spelt: list[str] = []
    repeating = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            given, equals, value = word.partition("=")
            name = known.get(given[2:].replace("-", "_"))
            if name and not equals and following.startswith("--") and config.model_fields[name].annotation is not bool:
                raise UserError(f"{given}: wants a value before {following}; if that is the value, {given}={following}")
            word = f"{flag(name)}{equals}{value}" if name else word
            repeating = flag(name) if name and not equals and is_list(config.model_fields[name]) else ""
        elif repeating and spelt[-1] != repeating:
            spelt.append(repeating)
        spelt.append(word)
    return spelt


# ---- YAML --------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and 2024-01-31 a text, as everybody but YAML 1.1 expects."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # `!!int x`, or a number of five thousand digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


class Dumper(yaml.SafeDumper):
    """Quotes the texts that ``Loader``, or plain YAML 1.1, would take for something else."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def from_yaml_text(text: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of each entry of a YAML mapping."""
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: wants a mapping, one `option: value` a line")
        for key, value in node.value:
            line = key.start_mark.line + 1
            yield str(loader.construct_object(key)), loader.construct_object(value, deep=True), line
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def plain(cfg: Section) -> dict[str, Any]:
    """Every option of a config as JSON knows it."""
    return cfg.model_dump(mode="json")


def record(cfg: Section) -> dict[str, Any]:
    """Every option, after the command that they are for."""
    command = command_of(type(cfg))
    return ({"method": command} if command else {}) | plain(cfg)


def to_yaml(cfg: Section) -> str:
    return dump_yaml(record(cfg))


def dump_yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000))


PLACES = ("accelerate", "slurm")
"""Folders, beside those of the recipes, of files that say where to train."""


def ready_made(*kinds: str) -> dict[str, Path]:
    """Name, such as lora/tiny-hearts, to file, of what comes with sdtune in the folders named, or in all."""
    here = Path(__file__).parent.parent
    root = here / "_recipes" if (here / "_recipes").is_dir() else here.parent / "recipes"
    files = sorted([*root.glob("*/*.yaml"), *root.glob("*/*.sbatch")])
    return {str(p.relative_to(root).with_suffix("")): p for p in files if not kinds or p.parent.name in kinds}


def shipped() -> dict[str, Path]:
    """Name, such as lora/tiny-hearts, to the file of each ready-made recipe."""
    return {name: path for name, path in ready_made().items() if path.parent.name not in PLACES}


def config_file(name: str) -> Path:
    """The file that ``--config`` means: a path, or the name of a ready-made recipe."""
    return found(name, "--config", shipped(), "recipe")


def found(name: str, option: str, known: Mapping[str, Path], what: str) -> Path:
    if (path := Path(name)).is_file():
        return path
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    raise UserError(
        f"{option} {name}: no such file or {what}".strip()
        + (f"; did you mean {close[0]}?" if close else "; `sdtune ls` lists them")
    )


def same_command(cfg: Section, words: list[str]) -> str:
    """The shortest command line that gives ``cfg`` again, from its defaults."""
    given = {name: value for name, value in plain(cfg).items() if name in cfg.model_fields_set}
    return command_line(words, given, defaults_of(type(cfg)))


def defaults_of(config: type[Section]) -> dict[str, Any]:
    """The defaults as JSON values; a required option has none."""
    fields = config.model_fields.items()
    return {name: to_jsonable_python(field.get_default()) for name, field in fields if not field.is_required()}


def command_line(words: list[str], values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """``words`` and a flag for each of ``values`` (JSON values by option) that differs from its default."""
    differing = {name: v for name, v in values.items() if name not in defaults or v != defaults[name]}
    return shlex.join([*words, *(word for name, value in differing.items() for word in flag_words(name, value))])


def flag_words(name: str, value: Any) -> list[str]:
    """An option as it is given on the command line."""
    if isinstance(value, bool):
        return [flag(name) if value else "--no-" + name.replace("_", "-")]
    if isinstance(value, list):
        if any(str(v).startswith("-") for v in value):
            return [f"{flag(name)}={v}" for v in value]
        return [flag(name), *map(str, value)]
    if isinstance(value, dict):
        flow: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": 10**9}
        value = yaml.dump(value, Dumper=Dumper, **flow).strip()
    text = str(value)
    return [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
