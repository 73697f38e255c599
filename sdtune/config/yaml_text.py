"""YAML as people expect it: how options are read from a file, and how they are written so that any reader agrees."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sdtune.config.errors import UserError


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


def from_text(text: str) -> Any:
    """The value that a piece of YAML stands for; the text itself if it is none."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of each entry of a YAML mapping.

    Raises:
        UserError: the file holds something else.
    """
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


def to_text(mapping: dict[str, Any]) -> str:
    """A mapping as a file, an option on each line."""
    return str(yaml.dump(mapping, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000))


def to_flow(mapping: dict[str, Any]) -> str:
    """A mapping on one line, as a flag takes it: {a: 1, b: 2}."""
    flow: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": 10**9}
    return str(yaml.dump(mapping, Dumper=Dumper, **flow)).strip()
