"""Imports go one way: a module knows the floors below its own, and of its own floor only what is written here."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdtune

ROOT = Path(sdtune.__file__).parent

FLOORS = (
    "configs needless",
    "methods verbs",
    "checkpoints curves data diffusion distances draws environment float8 folder guidance guides hub inception lowrank "
    "noisy_classifier optim options peers plan precision public quantize samplers schedules shapes sheets signals "
    "usage window",
    "adapters cache families metrics noised pipelines recipe report sampling templates words",
    "card encoded engine features formats loading pixel_models pixels plots preview samples state",
    "fold inspect_adapter judges publish sample sample_pixels",
    "class_pictures compared finetune zero",
    "convert engines evaluate recipes scores truncate",
    "merge train",
    "memory",
    "fitting",
    "check",
    "launch cli",
    "__main__",
)
"""Bottom to top; a package is one name. What is not written here may not be imported, inside a function or out."""

NEIGHBOURS = {
    "data": "draws peers",
    "distances": "draws",
    "folder": "options",
    "preview": "engine",
    "state": "engine",
    "peers": "checkpoints options",
    "cli": "launch",
    "samples": "encoded",
    "sample": "sample_pixels",
    "sample_pixels": "judges",
}
"""Imports along a floor."""

LIGHT = {"annotated_types", "pydantic", "typer", "yaml"}
"""What may be loaded before a mistake is told, besides the standard library."""

FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


def modules() -> dict[str, Path]:
    """Dotted name below sdtune, to the file; the package itself is empty."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


def part(name: str) -> str:
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
    known = modules()
    found = set()
    for name in names:
        if part(name) == "sdtune":
            inner = name.partition(".")[2]
            while inner not in known:  # `from sdtune.configs import Run` imports configs
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found - {""}


def package_of(name: str) -> str:
    inside = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    return f"sdtune.{inside}".rstrip(".")


def wrong(name: str, imports: set[str]) -> list[str]:
    """The imports that module ``name`` may not have."""
    allowed = NEIGHBOURS.get(part(name), "").split()
    return [
        other
        for other in sorted(imports)
        if part(other) != part(name) and FLOOR[part(other)] >= FLOOR[part(name)] and part(other) not in allowed
    ]


def of(name: str) -> set[str]:
    return own(imported(ast.parse(modules()[name].read_text(encoding="utf-8")), package_of(name)))


MODULES = [name for name in modules() if name]


def test_every_module_has_a_floor():
    assert {part(name) for name in MODULES} == set(FLOOR)
    assert len(FLOOR) == len(" ".join(FLOORS).split())


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    assert wrong(name, of(name)) == []


def test_no_neighbour_is_written_down_in_vain():
    for name, others in NEIGHBOURS.items():
        imports = {part(other) for module in MODULES if part(module) == name for other in of(module)}
        assert imports >= set(others.split()), name
        assert all(FLOOR[other] == FLOOR[name] for other in others.split())


@pytest.mark.parametrize("package", ["data", "families", "recipes"])
def test_nothing_goes_in_circles_inside_a_package(package):
    inside = {name: {o for o in of(name) if part(o) == package} for name in MODULES if part(name) == package}
    while free := [name for name, others in inside.items() if not others]:
        for name in free:
            del inside[name]
        inside = {name: others - set(free) for name, others in inside.items()}
    assert inside == {}


def test_no_recipe_knows_another_and_none_knows_one_kind_of_model():
    for name in MODULES:
        if name.startswith("recipes."):
            assert [o for o in of(name) if part(o) == "recipes"] == []
        if part(name) != "families":
            assert [o for o in of(name) if o.startswith("families.")] == []


@pytest.mark.parametrize("name", ["__main__", "cli", "configs", "launch", "methods", "needless", "options", "verbs"])
def test_a_mistake_is_told_before_anything_heavy_is_loaded(name):
    waiting, seen = [name], set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        names = set(imported(ast.parse(modules()[module].read_text(encoding="utf-8")), package_of(module), deep=False))
        foreign = {part(n) for n in names} - {"sdtune"} - sys.stdlib_module_names
        assert foreign <= LIGHT, module
        waiting += own(iter(names)) - seen


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from sdtune.train import train", ["train"]),
        ("from sdtune import cli, draws", ["cli"]),
        ("import sdtune.launch as x", ["launch"]),
        ("def f():\n    from sdtune.recipes.lora import Lora", ["recipes.lora"]),
        ("if TYPE_CHECKING:\n    from sdtune.state import State", ["state"]),
        ("importlib.import_module('sdtune.sample')", ["sample"]),
        ("from ..train import train", ["train"]),
        ("from .. import train", ["train"]),
        ("from . import stable_diffusion\nfrom .stable_diffusion import StableDiffusion", []),
        ("from sdtune.recipe import Recipe", ["recipe"]),  # beside families, and no neighbour
        ("import torch\nfrom sdtune import __version__\nfrom sdtune.configs import Run", []),
    ],
)
def test_an_import_that_goes_up_is_seen_however_it_is_written(source, found):
    assert wrong("families", own(imported(ast.parse(source), "sdtune.families"))) == found


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_read_in_one_sitting(name):
    assert len(modules()[name].read_text(encoding="utf-8").splitlines()) <= 400
