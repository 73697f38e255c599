"""Write the generated parts of the documentation: options, recipes, files, code, each from its one source.

    python tools/make_docs.py            # or `make docs`

A part stands between two comments in a Markdown file, such as ``<!-- made: options lora -->`` and ``<!-- end -->``;
what is between them is replaced. ``tests/test_docs.py`` fails when a file is not as this script would write it.
"""

import ast
import io
import re
import runpy
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

from pydantic.fields import FieldInfo

from sdtune.config import fields, shipped
from sdtune.config.commands import METHODS, VERBS
from sdtune.config.sections import MAY_CHANGE, Launch, Options

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(r"(<!-- made: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
ROOMS = "config run publish diffusion data models conversion sampling recipes evaluation training".split()
"""In the order in which they may import one another."""


def pages() -> list[Path]:
    """The Markdown files of the repository."""
    return sorted(p for place in ("*.md", "docs/**/*.md", "recipes/**/*.md") for p in ROOT.glob(place))


def made(text: str) -> str:
    """``text`` with its generated parts as they should be."""

    def part(found: re.Match[str]) -> str:
        kind, *names = found[2].split()
        return f"{found[1]}\n{PARTS[kind](*names)}\n\n{found[3]}"

    return PART.sub(part, text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def option_tables(method: str) -> str:
    """A table for each section of a command's config, and one of what the command itself takes."""
    config = (METHODS | VERBS)[method].load()
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, field in fields.by_section(config):
        other = ", ".join(f"`{fields.flag(n)}`" for n in fields.aliases_of(field))
        meaning = fields.description(config, name) + (f" Also {other}." if other else "")
        row = (f"`{fields.written(config, name)}`", choices(field), default(field), meaning)
        sections.setdefault(fields.title_of(config, name), []).append(row)
    parts = [
        f"**{section}**\n\n{table(('Option', 'Takes', 'Default', 'Meaning'), rows)}"
        for section, rows in sections.items()
    ]
    launch = Launch if method in METHODS else Options
    rows = ((f"`{fields.flag(name)}`", fields.description(launch, name)) for name in launch.model_fields)
    own = table(("Option", "Meaning"), rows)
    return "\n\n".join([*parts, f"**On the command line only**\n\n{own}"])


def choices(field: FieldInfo) -> str:
    if field.annotation is bool:
        return "flag, `--no-...`"
    shown = fields.metavar(field)
    return ", ".join(f"`{choice}`" for choice in shown.split("|")) if "|" in shown else shown.lower()


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    match value:
        case None | "" | [] | {}:
            return "-"
        case bool():
            return "on" if value else "off"
        case float():
            return f"`{value:g}`"
        case list():
            return f"`{' '.join(map(str, value))}`"
        case _:
            return f"`{value}`"


def recipe_table() -> str:
    """The shipped recipes, from the comment at the head of each file."""
    rows = []
    for name in shipped.recipes():
        head = header(ROOT / "recipes" / f"{name}.yaml")
        keys = ("hardware", "time", "memory", "result")
        rows.append((f"[`{name}`]({name}.yaml)", head["title"], *(head[key] for key in keys)))
    return table(("Recipe", "What it is", "Hardware", "Time", "Memory", "Result"), rows)


def header(file: Path) -> dict[str, str]:
    """The comment that a recipe begins with: its title, then ``key: value`` lines."""
    lines = [line[1:].strip() for line in file.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()]
    pairs = (line.partition(":") for line in lines[1:])
    return {"title": lines[0]} | {key.strip(): value.strip() for key, _, value in pairs}


def file_tables(*folders: str) -> str:
    """A heading and a table per folder: the first sentence of each docstring. Links are those of a page in docs/."""
    places = [place for folder in folders for place in sorted({f.parent for f in (ROOT / folder).rglob("*.py")})]
    return "\n\n".join(part for place in places for part in folder_table(place))


def folder_table(folder: Path) -> Iterator[str]:
    """Heading, docstring and table of the files in a folder, where there is anything to say."""
    files = {file: text for file in sorted(folder.glob("*.py")) if (text := first_sentence(file))}
    about = files.pop(folder / "__init__.py", "")
    if files or about:
        yield f"## {folder.relative_to(ROOT)}/"
    if about:
        yield about
    if files:
        rows = ((f"[`{file.name}`](../{file.relative_to(ROOT)})", text) for file, text in files.items())
        yield table(("File", "What it is"), rows)


def first_sentence(file: Path) -> str:
    """That of the docstring of a Python file; empty where it has none."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = re.split(r"(?<=\.)\s+(?=[A-Z])", text.partition("\n\n")[0])[0]
    return " ".join(first.split()).replace("``", "`")


def room_table(up: str = "") -> str:
    """A line per room, from its docstring: what lives there, and its law of imports. ``up`` leads to the root."""
    rows = []
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((ROOT / "sdtune" / room / "__init__.py").read_text(encoding="utf-8"))) or ""
        what, _, law = " ".join(text.partition("\n\n")[0].split()).rpartition(" Imports ")
        rows.append((f"[`{room}`]({up}sdtune/{room}/)", what.rstrip("."), f"imports {law.rstrip('.')}"))
    return table(("Room", "What lives there", "Law"), rows)


def may_change() -> str:
    """The options that are free when a run is continued, sorted."""
    cut = {"train_batch_size", "gradient_accumulation_steps"}
    return ", ".join(f"`{name}`" for name in sorted(MAY_CHANGE - cut)) + "."


def code(name: str) -> str:
    """A Python file as it is."""
    return f"```python\n{(ROOT / name).read_text(encoding='utf-8')}```"


def printed(name: str) -> str:
    """What a Python file prints."""
    output = io.StringIO()
    with redirect_stdout(output):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return output.getvalue().strip()


def fault_table() -> str:
    """What the tests do to a run and to its files: the marker ``fault`` of a test, and where it stands."""
    rows = []
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda file: (len(file.parts), file))
    for file in files:
        for test in ast.parse(file.read_text(encoding="utf-8")).body:
            for mark in test.decorator_list if isinstance(test, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    fault, outcome = (ast.literal_eval(word) for word in mark.args)
                    place = file.relative_to(ROOT)
                    rows.append((fault, outcome, f"[{file.stem}](../{place}): `{test.name.removeprefix('test_')}`"))
    return table(("What goes wrong", "What happens", "Test"), rows)


PARTS = {
    "faults": fault_table,
    "options": option_tables,
    "recipes": recipe_table,
    "rooms": room_table,
    "files": file_tables,
    "may-change": may_change,
    "code": code,
    "printed": printed,
}


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := made(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
