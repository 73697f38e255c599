"""YAML as people expect it: how options are read from a file, and how they are written so that any reader agrees."""

import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml

from sdtune.config.errors import UserError

DEPTH = 50
"""Levels of a mapping in a mapping that are read."""
SIZE = 10_000
"""Values that a file may stand for. An alias of an alias of an alias can stand for billions."""
HOW_TO_QUOTE = "in double quotes a backslash begins an escape, so put a Windows path in single quotes"


class Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, and 2024-01-31, 012, 0x1F and 1:30 are texts, as everybody but YAML 1.1 expects.

    YAML 1.1 takes 012 for ten and 1:30 for ninety. As texts they are no numbers, and an option says so.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {DEPTH} levels", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and size_of(node, {}) > SIZE:
            raise yaml.composer.ComposerError(None, None, f"stands for more than {SIZE} values", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError) as error:  # `!!int x`, or a number of five thousand digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    def construct_text(self, node: yaml.Node) -> Any:
        """The text of a value as it stands there: of `no` or 12e45 as well. A list is one of texts."""
        if isinstance(node, yaml.SequenceNode):
            return [self.construct_text(item) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null":
            return node.value
        return self.construct_object(node, deep=True)


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes the texts that ``Loader``, or plain YAML 1.1, would take for something else.

    By libyaml where PyYAML was built with it: a tenth of the time, and the same text.
    """


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":timestamp", ":int", ":float"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
INT = re.compile(r"^[-+]?(0|[1-9][0-9_]*)$")
Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
FLOAT = re.compile(r"^[-+]?([0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE])|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$")
NOT_FINITE = re.compile(r"^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
for _pattern in (FLOAT, NOT_FINITE):
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _pattern, list("-+0123456789."))
Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def size_of(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, each alias counted as what it repeats."""
    if id(node) not in known:
        known[id(node)] = 1  # of a node that contains itself, which is refused later
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] += sum(size_of(part, known) for part in parts)
    return known[id(node)]


def from_text(text: str) -> Any:
    """The value that a piece of YAML stands for; the text itself if it is none."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path, texts: Container[str] = ()) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of each entry of a YAML mapping.

    Args:
        texts: keys, with underscores, whose values are texts whatever they look like.

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
            if key.value == "<<":
                raise UserError(f"{path}:{line}: <<: merge keys are not read; write the options out")
            name = str(loader.construct_object(key))
            as_text = name.replace("-", "_") in texts
            yield name, loader.construct_text(value) if as_text else loader.construct_object(value, deep=True), line
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or str(error).splitlines()[0])
        hint = f" ({HOW_TO_QUOTE})" if "escape" in problem else ""
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {problem}{hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: too many levels") from None


def to_text(mapping: dict[str, Any]) -> str:
    """A mapping as a file, an option on each line."""
    return str(yaml.dump(mapping, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000))


def to_flow(mapping: dict[str, Any]) -> str:
    """A mapping on one line, as a flag takes it: {a: 1, b: 2}."""
    flow: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": 10**9}
    return str(yaml.dump(mapping, Dumper=Dumper, **flow)).strip()
