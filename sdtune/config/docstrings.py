"""The docstrings under the fields of a class, which --help and the documentation show.

Pydantic's `use_attribute_docstrings` reads the source of each class whenever it is imported, also to refuse an option
that is mistyped; here a file is parsed once, and only for help.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path


def of_field(cls: type, name: str) -> str:
    """The docstring under field ``name`` of ``cls``, or of the nearest class that it inherits it from; else nothing."""
    own = (of_class(base).get(name) for base in cls.__mro__ if name in base.__dict__.get("__annotations__", {}))
    return next(filter(None, own), "")


def of_class(cls: type) -> dict[str, str]:
    """Each field that ``cls`` itself declares with a docstring, and that."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return in_file(file).get(cls.__qualname__, {}) if file else {}


@cache
def in_file(file: str) -> dict[str, dict[str, str]]:
    """The documented fields of each class in a Python file, by the class's ``__qualname__``."""
    return dict(classes(ast.parse(Path(file).read_text(encoding="utf-8")), ""))


def classes(node: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, dict(documented(child))
            inner = f"{prefix}{child.name}."
        elif isinstance(child, ast.FunctionDef):
            inner = f"{prefix}{child.name}.<locals>."
        yield from classes(child, inner)


def documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The fields of a class that a string follows."""
    for field, text in pairwise(node.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                yield name, inspect.cleandoc(doc)
