"""The documentation is true: its commands parse, its recipes validate, its tables and links are up to date."""

import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from sdtune.config import parsing
from sdtune.config.methods import METHODS
from sdtune.config.verbs import VERBS
from tests.conftest import status
from tools.make_docs import ROOT, header, made, pages, shipped

NAMES = [str(page.relative_to(ROOT)) for page in pages()]
COMMANDS = {c.method for c in (*METHODS, *VERBS)} | {"run", "ls", "cp", "env", "check"}


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


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes(name):
    method = name.partition("/")[0]
    head = header(ROOT / "recipes" / f"{name}.yaml")
    assert head.keys() == {"title", "command", "hardware", "time", "memory", "result"}
    assert head["command"].startswith(f"sdtune {method} --config {name}")
    assert status([*shlex.split(head["command"])[1:], "--dry-run"]) == 0


def test_recipes_are_found_by_name():
    files = [p for p in (ROOT / "recipes").glob("*/*") if p.parent.name not in parsing.PLACES]
    assert sorted(shipped()) == sorted(f"{p.parent.name}/{p.stem}" for p in files)


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


def test_what_is_needed_is_pinned():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    names = [re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", spec)[0]).lower() for spec in needed]
    assert [name for name in names if name not in pinned] == []
