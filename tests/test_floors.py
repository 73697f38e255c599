"""The laws of the rooms: what each may import, and how long its files may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdtune
from sdtune.models import families

ROOT = Path(sdtune.__file__).parent

LAWS = {
    "config": "",
    "run": "config",
    "publish": "config run",
    "diffusion": "config",
    "data": "config run",
    "models": "config run data diffusion",
    "conversion": "config run models",
    "sampling": "config run diffusion models",
    "recipes": "config run publish diffusion data models conversion sampling",
    "evaluation": "config run publish diffusion data models conversion sampling",
    "training": "config run publish diffusion data models conversion sampling recipes evaluation",
}
"""Room -> the rooms that it may import, inside a function or out. The entry points above them may import all."""

ENTRY_POINTS = {"", "__main__", "cli", "noisy_classifier"}
"""Modules outside the rooms; the last one keeps the path that published model cards name."""

LIGHT = {"annotated_types", "pydantic", "pydantic_core", "typer", "yaml"}
"""What may be imported before the options are valid, besides the standard library."""

TABLES = {"config.sections", "config.verbs", "config.foreign_flags"}
"""Declarations of options, which may exceed the length of a file that has logic."""

LINES = 300
PAGE = 80
"""Lines of a family."""


def modules() -> dict[str, Path]:
    """Dotted name below sdtune, to the file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()


def room(name: str) -> str:
    return name.partition(".")[0]


def imported(tree: ast.AST, package: str = "", deep: bool = True) -> Iterator[str]:
    """Full names that a piece of code imports, ``from x import y`` as ``x.y``.

    Args:
        package: where relative imports start.
        deep: whether those inside functions, and by ``import_module("...")``, count.
    """
    for node in ast.walk(tree) if deep else at_import(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not the bodies of functions, nor what is for types only."""
    for child in ast.iter_child_nodes(node):
        types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not types_only:
            yield child
            yield from at_import(child)


def own(names: Iterator[str]) -> set[str]:
    """Those of sdtune, as modules."""
    found = set()
    for name in names:
        if room(name) == "sdtune":
            inner = name.partition(".")[2]
            while inner not in MODULES:  # `from sdtune.config.sections import Run` imports config.sections
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found - {""}


def package_of(name: str) -> str:
    inside = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    return f"sdtune.{inside}".rstrip(".")


def imports_of(name: str, deep: bool = True) -> set[str]:
    """The modules of sdtune that module ``name`` imports."""
    return own(imported(ast.parse(MODULES[name].read_text(encoding="utf-8")), package_of(name), deep))


def forbidden(where: str, imports: set[str]) -> list[str]:
    """The imports that a module in room ``where`` may not have."""
    return [other for other in sorted(imports) if room(other) not in {where, *LAWS[where].split()}]


def test_every_module_is_in_a_room_and_every_room_states_its_law():
    assert {room(name) for name in MODULES} - ENTRY_POINTS == set(LAWS)
    assert [r for r in LAWS if not ast.get_docstring(ast.parse((ROOT / r / "__init__.py").read_text()))] == []


def test_the_laws_have_no_circle():
    known: list[str] = []
    for name, allowed in LAWS.items():
        assert set(allowed.split()) <= set(known), f"{name} may import a room that comes after it"
        known.append(name)


def test_every_room_keeps_its_law():
    broken = {
        name: wrong for name in MODULES if room(name) in LAWS if (wrong := forbidden(room(name), imports_of(name)))
    }
    assert broken == {}


@pytest.mark.parametrize("room_name", LAWS)
def test_nothing_goes_in_circles_inside_a_room(room_name):
    inside = {n: {o for o in imports_of(n) if room(o) == room_name} - {n} for n in MODULES if room(n) == room_name}
    while free := [name for name, others in inside.items() if not others]:
        for name in free:
            del inside[name]
        inside = {name: others - set(free) for name, others in inside.items()}
    assert inside == {}


def test_no_recipe_knows_another_and_none_knows_one_kind_of_model():
    methods = {n for n in MODULES if n.startswith("recipes.") and is_method(n)}
    assert {n: o for n in methods if (o := imports_of(n) & (methods - {n}))} == {}
    outside = [n for n in MODULES if not n.startswith("models.families")]
    assert {n: o for n in outside if (o := {i for i in imports_of(n) if i.startswith("models.families.")})} == {}


def test_a_base_is_one_page_and_its_parts_are_named_there_alone():
    bases = {value.partition(":")[0].removeprefix("sdtune.") for value in families.CLASSES.values()}
    lines = {name: len(MODULES[name].read_text(encoding="utf-8").splitlines()) for name in bases}
    assert {name: count for name, count in lines.items() if count > PAGE} == {}
    recipes = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items() if room(name) == "recipes"}
    assert [name for name, source in recipes.items() if '"unet"' in source or '"transformer"' in source] == []


def is_method(name: str) -> bool:
    """Whether a module defines a method: a class with a ``Config`` of its own."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assigned = (a for c in tree.body if isinstance(c, ast.ClassDef) for a in c.body if isinstance(a, ast.Assign))
    return any(isinstance(t, ast.Name) and t.id == "Config" for a in assigned for t in a.targets)


def test_the_loop_knows_of_recipes_only_their_interface():
    for name in ("training.loop", "training.engine", "training.engines", "training.state"):
        assert {o for o in imports_of(name) if room(o) == "recipes"} <= {"recipes.recipe"}, name


def test_mistakes_in_options_are_found_before_anything_heavy_is_imported():
    waiting, seen = ["__main__", "cli", "training.launch", *(n for n in MODULES if room(n) == "config")], set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        names = set(imported(tree, package_of(module), deep=False))
        foreign = {room(n) for n in names} - {"sdtune"} - sys.stdlib_module_names
        assert foreign <= LIGHT, module
        waiting += own(iter(names)) - seen


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from sdtune.training.loop import train", ["training.loop"]),
        ("from sdtune import cli\nfrom sdtune.run import rng", ["cli"]),
        ("import sdtune.training.launch as x", ["training.launch"]),
        ("def f():\n    from sdtune.recipes.lora import Lora", ["recipes.lora"]),
        ("if TYPE_CHECKING:\n    from sdtune.training.state import State", ["training.state"]),
        ("importlib.import_module('sdtune.sampling.sample')", ["sampling.sample"]),
        ("from ..recipes.recipe import Recipe", ["recipes.recipe"]),
        ("from . import loading\nfrom .loading import load", []),
        ("import torch\nfrom sdtune import __version__\nfrom sdtune.config.sections import Run", []),
    ],
)
def test_an_import_that_breaks_a_law_is_seen_however_it_is_written(source, found):
    assert forbidden("models", own(imported(ast.parse(source), "sdtune.models"))) == found


def test_a_file_is_read_in_one_sitting():
    long = {n: c for n, p in MODULES.items() if (c := len(p.read_text(encoding="utf-8").splitlines())) > LINES}
    assert {name: count for name, count in long.items() if name not in TABLES} == {}


STARTS = "train Ranks Forked interrupt launch launch_and_interrupt run Popen soak".split()
"""What starts a process, as an attribute of the modules `ranks`, `subprocess` and `soak`."""
STARTING = {"elsewhere", "python"}
"""Fixtures with which a test starts one."""


def starts_processes(function: ast.FunctionDef) -> bool:
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    named = [f for f in called if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)]
    starting = [f for f in named if f.value.id in ("ranks", "subprocess", "soak") and f.attr in STARTS]
    return bool(starting) or bool({a.arg for a in function.args.args} & STARTING)


def test_tests_that_start_processes_are_marked():
    unmarked = []
    for file in Path(__file__).parent.rglob("test_*.py"):
        tests = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef))
        starting = (test for test in tests if test.name.startswith("test_") and starts_processes(test))
        marks = {test.name: " ".join(map(ast.unparse, test.decorator_list)) for test in starting}
        unmarked += [f"{file.name}::{name}" for name, marked in marks.items() if "mark.processes" not in marked]
    assert unmarked == []


def test_a_package_hides_none_of_its_modules_behind_another_name():
    """Whichever is imported last would win."""
    hidden = []
    for init in ROOT.rglob("__init__.py"):
        modules = {path.stem for path in (*init.parent.glob("*.py"), *init.parent.glob("*/"))}
        for node in ast.parse(init.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                hidden += [f"{init.parent.name}.{alias.name}" for alias in node.names if alias.name in modules]
    assert hidden == []
