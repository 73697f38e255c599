"""The documentation is true: its commands parse, its recipes validate, its tables and links are up to date."""

import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from sdtune.config import shipped
from sdtune.config.commands import methods, verbs
from tests.conftest import status
from tools.make_docs import ROOT, header, made, pages
from tools.make_site import Stage, problems

NAMES = [str(page.relative_to(ROOT)) for page in pages()]
COMMANDS = {c.method for c in (*methods(), *verbs())} | {"run", "ls", "cp", "env", "check"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The command lines of a page: those of its shell blocks, and those quoted in its sentences."""
    for block in blocks(text, "sh"):
        yield from (
            shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines() if line.strip()
        )
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (shlex.split(quoted) for quoted in re.findall(r"`((?:sdtune|make) [^`]+)`", prose))


@pytest.mark.parametrize("name", NAMES)
def test_generated_parts_are_up_to_date(name):
    assert made(read(name)) == read(name), "run `make docs`"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)\s]+)\)", read(name))
    local = [t.partition("#")[0] for t in targets if not t.startswith(("http", "#"))]
    assert [t for t in local if not (ROOT / name).parent.joinpath(t).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    verbs = re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE)
    for words in commands(read(name)):
        if words[0] == "make":
            assert words[1] in verbs
        if "sdtune" not in words:
            continue
        verb, *rest = words[words.index("sdtune") + 1 :]
        assert verb in COMMANDS
        if verb in ("ls", "cp") and (rest or verb == "ls"):
            assert status([verb, *rest]) == 0
        elif any(word.startswith("-") for word in rest):
            assert status([verb, *rest, "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.parametrize("name", NAMES)
def test_transcripts_are_what_is_printed(name, tmp_path):
    told = "import sys; print('torch' in sys.modules or 'diffusers' in sys.modules)"
    run = f"import atexit; atexit.register(lambda: exec({told!r})); from sdtune.cli import main; main()"
    for block in blocks(read(name), "console"):
        line, _, printed = block.partition("\n")
        words = [sys.executable, "-c", run, *shlex.split(line.removeprefix("$ sdtune "))]
        ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (2, printed)
        assert ended.stdout == "False\n", "torch was imported"


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_compile(name):
    for source in blocks(read(name), "python"):
        compile(source, name, "exec")


@pytest.mark.parametrize("name", shipped.recipes())
def test_shipped_recipes(name):
    method = name.partition("/")[0]
    head = header(ROOT / "recipes" / f"{name}.yaml")
    assert head.keys() == {"title", "command", "hardware", "time", "memory", "result"}
    assert head["command"].startswith(f"sdtune {method} --config {name}")
    assert status([*shlex.split(head["command"])[1:], "--dry-run"]) == 0


def test_recipes_are_found_by_name():
    files = [p for p in (ROOT / "recipes").glob("*/*") if p.parent.name not in shipped.PLACES]
    assert sorted(shipped.recipes()) == sorted(f"{p.parent.name}/{p.stem}" for p in files)


def test_citations_are_in_the_index_of_papers():
    papers = read("docs/papers.md")
    cited = {
        (" ".join(who.split()), year)
        for file in (ROOT / "sdtune").rglob("*.py")
        for who, year in re.findall(
            r"\(?([A-Z][a-z]+(?:\s+et\s+al\.|\s+&\s+[A-Z][a-z]+)?)\s+((?:19|20)\d\d)\b",
            file.read_text(encoding="utf-8"),
        )
    }
    assert cited
    assert sorted(f"{who} {year}" for who, year in cited if f"{who} {year}" not in papers) == []


def test_front_page_is_short_and_its_pictures_are_small():
    assert len(read("README.md").splitlines()) <= 150
    assert sum(picture.stat().st_size for picture in (ROOT / "docs" / "pictures").iterdir()) < 1_000_000


def test_every_command_and_extra_is_described():
    table = read("docs/commands.md")
    assert [name for name in sorted(COMMANDS) if f"`sdtune {name}" not in table] == []
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert [name for name in extras if f"`{name}`" not in read("docs/install.md")] == []


def test_every_page_is_in_the_menu_of_the_site():
    menu = re.findall(r'= "([\w/.-]+\.md)"', read("docs/site/zensical.toml"))
    assert [name for name in NAMES if name not in menu] == []
    assert [name for name in menu if not name.startswith("api/") and name not in NAMES] == []


def test_site_names_what_is_missing_and_what_would_be_fetched(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x">b</a><img src="c.png"><script src="https://host/d.js"></script>'
    )
    found = ["a.html: fetches https://host/d.js", "a.html: no file b.html#x", "a.html: no file c.png"]
    assert problems(tmp_path) == found
    (tmp_path / "b.html").write_text('<a href="https://host/">a link is not fetched</a>')
    assert problems(tmp_path) == [found[0], found[2]]


def test_links_of_the_site_lead_to_pages_of_files_and_folders(tmp_path):
    stage = Stage(tmp_path)
    page = "[a](../sdtune/recipes/lora.py#x) [b](../recipes/slurm) [c](data.md) [d](https://host/e)\n```\n[f](g)\n```\n"
    linked = "[a](../sdtune/recipes/lora.py.md#x) [b](../recipes/slurm/index.md) [c](data.md) [d](https://host/e)"
    assert stage.linked(page, ROOT / "docs") == f"{linked}\n```\n[f](g)\n```\n"
    assert "class Lora" in (tmp_path / "sdtune/recipes/lora.py.md").read_text()
    assert "node.sbatch.md" in (tmp_path / "recipes/slurm/index.md").read_text()


def test_what_is_needed_is_pinned():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    names = [re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", spec)[0]).lower() for spec in needed]
    assert [name for name in names if name not in pinned] == []
