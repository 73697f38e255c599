"""From the text that a person writes to a config and back; every mistake is told at once, in user words."""

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from sdtune.config import shipped, yaml_text
from sdtune.config.errors import UserError
from sdtune.config.fields import (
    command_of,
    flag,
    is_list,
    is_mapping,
    names_of,
    takes_number,
    takes_text,
    written,
)
from sdtune.config.foreign_flags import ANSWERS, COMMON_NAMES
from sdtune.config.section_base import Section
from sdtune.config.untrusted import without_secrets

# ---- from text to a config ---------------------------------------------------------------------------


def resolve(config: type[Section], file: str | None, flags: Mapping[str, Any], unknown: list[str]) -> Any:
    """Merge defaults < YAML < flags and validate; ``UserError`` lists every problem.

    Args:
        flags: field name to the text of its flag, those given on the command line only.
        unknown: words of the command line that are no flag of this command.
    """
    problems = list(unknown_words(config, unknown))
    cfg, more = merged(config, file, flags)
    if problems := problems + more:
        raise UserError("\n       ".join(problems))
    return cfg


def merged(config: type[Section], file: str | None, flags: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The config that a file and flags make, and what is wrong with them; no config where something is.

    Raises:
        UserError: the file cannot be read, or is for another command.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if file is not None:
        path, known, command = shipped.config_file(file), names_of(config), command_of(config)
        texts = {spelling for spelling, name in known.items() if takes_text(config.model_fields[name])}
        for key, value, line in yaml_text.read_yaml(path, texts):
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
        values[name] = yaml_text.from_text(value) if is_mapping(config.model_fields[name]) else value
        origin[name] = written(config, name)
    for name in [name for name in values if takes_number(config.model_fields[name])]:
        given = values[name] if isinstance(values[name], list) else [values[name]]
        for value in given:
            if isinstance(value, bool):  # pydantic would take 1 for it
                problems.append(f"{origin[name]}: wants a number, not {value}")
            elif name not in flags and re.fullmatch(r"[-+]?0[\d_]+", str(value)):  # octal to readers of YAML 1.1
                problems.append(f"{origin[name]}: wants a number without leading zeros, not {value}")
            else:
                continue
            del values[name]
            break
    cfg, more = validated(config, values, origin, flags)
    problems += more
    return (None if problems else cfg), problems


def validated(
    config: type[Section], values: Mapping[str, Any], origin: Mapping[str, str], flags: Iterable[str] = ()
) -> tuple[Any, list[str]]:
    """``config`` with these values, or nothing and what is wrong with them.

    Args:
        origin: where the value of a field was given; a field that is not in it is named by its flag.
        flags: fields that were given on the command line, where a default is not there by chance.
    """
    try:
        return config.model_validate(values, context={"flags": set(flags)}), []
    except ValidationError as error:
        return None, [
            f"{origin.get(where) or written(config, where)}: {message}" if where else message
            for where, message in validation_messages(error)
        ]


def unknown_words(config: type[Section], words: list[str], more: Iterable[str] = ()) -> Iterator[str]:
    """A line for each word that is no option of ``config``, and no value of such a word.

    Args:
        more: names of options that the command takes beside those of ``config``.
    """
    after_flag = False
    for word in words:
        is_flag = word.startswith("-") and not re.fullmatch(r"-\.?\d.*", word)  # a negative number is a value
        if is_flag:
            given = word.partition("=")[0]
            yield f"{given}: no such option{advice(config, given.lstrip('-'), '--', more)}"
        elif not after_flag:
            yield f"{word}: unexpected argument; options start with --"
        after_flag = is_flag and "=" not in word


def advice(config: type[Section], name: str, dash: str, more: Iterable[str] = ()) -> str:
    """What to write in place of an unknown name."""
    name = name.replace("-", "_")
    known = [*names_of(config), *(["config", "dry_run"] if dash else []), *more]
    if answer := config.answers.get(name) or ANSWERS.get(name):
        return f"; {answer}"
    meant = next((other for other in COMMON_NAMES.get(name, ()) if other in known), None) or alike(name, known)
    shown = meant.replace("_", "-") if dash and meant else meant
    return f"; did you mean {dash}{shown}?" if shown else "; --help lists them"


def alike(name: str, known: Iterable[str]) -> str | None:
    """The known name of which ``name`` is a misspelling or a part; nothing if it may mean something else.

    They are compared word by word: ``eval_batch_size`` is no misspelling of ``train_batch_size``, although most of
    its letters are the same, and ``ddpm_num_inference_steps`` none of ``ddpm_num_steps``.
    """

    def closeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    def means(other: str) -> bool:
        words, others = name.split("_"), other.split("_")
        if len(words) == len(others) and all(closeness(a, b) >= 0.7 for a, b in zip(words, others, strict=True)):
            return True
        whole = closeness(name, other)
        return (whole >= 0.65 and set(words) <= set(others)) or closeness("".join(words), "".join(others)) >= 0.9

    return max(filter(means, known), key=lambda other: closeness(name, other), default=None)


def validation_messages(error: ValidationError) -> Iterator[tuple[str, str]]:
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
            case "dict_type":
                yield where, f"wants a mapping such as '{{d_coef: 2}}', not {given!r}"
            case "literal_error":
                choices = [c.strip("'") for c in re.findall(r"'[^']*'", str(limits["expected"]))]
                close = difflib.get_close_matches(str(given), choices, n=1)
                meant = f"; did you mean {close[0]}?" if close else ""
                yield where, f"{given!r} is none of {', '.join(choices)}{meant}"
            case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
                yield where, f"{e['msg'].removeprefix('Input ')}, not {given}"
            case "value_error":
                yield where, str(limits["error"])
            case _:
                yield where, f"{e['msg'].removeprefix('Input ')}, not {given!r}"


def canonical(config: type[Section], words: list[str]) -> list[str]:
    """The command line with each flag under its field's name and each list written out.

    ``--dataset_name d`` becomes ``--dataset d``, and ``--validation-prompt a b``, as argparse's nargs="+" takes it,
    becomes ``--validation-prompt a --validation-prompt b``.

    Raises:
        UserError: a flag stands where the value of another is due.
    """
    known = names_of(config)
    line: list[str] = []
    repeating = ""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word.startswith("--"):
            given, equals, value = word.partition("=")
            name = known.get(given[2:].replace("-", "_"))
            if name and not equals and following.startswith("--") and config.model_fields[name].annotation is not bool:
                raise UserError(f"{given}: wants a value before {following}; if that is the value, {given}={following}")
            word = f"{flag(name)}{equals}{value}" if name else word
            repeating = flag(name) if name and not equals and is_list(config.model_fields[name]) else ""
        elif repeating and line[-1] != repeating:
            line.append(repeating)
        line.append(word)
    return line


# ---- from a config to text ---------------------------------------------------------------------------


def plain(cfg: Section) -> dict[str, Any]:
    """Every option of a config as JSON knows it, as it may be recorded and shown: without secrets."""
    return {name: without_secrets(value) for name, value in cfg.model_dump(mode="json").items()}


def record(cfg: Section) -> dict[str, Any]:
    """Every option, after the command that they are for."""
    command = command_of(type(cfg))
    return ({"method": command} if command else {}) | plain(cfg)


def to_yaml(cfg: Section) -> str:
    """The file that gives ``cfg`` again."""
    return yaml_text.to_text(record(cfg))


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
    text = yaml_text.to_flow(value) if isinstance(value, dict) else str(value)
    return [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
