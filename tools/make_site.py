"""Build the website of the documentation into build/site, offline and strictly: a broken link stops it.

    python -m tools.make_site            # or `make site`

The pages are the Markdown files of the repository at their own paths. A file of another kind that a page links to gets
a page that shows it, and so does a folder, so that no link leaves the site but those to the web.
"""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tools.make_docs import ROOT, pages

BUILD = ROOT / "build"
SETTINGS = ROOT / "docs" / "site"
FETCHED = "https://unpkg.com/iframe-worker/shim"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sbatch": "bash"}
COPIED = {".png", ".svg"}
API = {
    "recipe": ("The interface of a recipe", ["sdtune/recipes/recipe.py"]),
    "families": ("Families of base models", ["sdtune/models/families"]),
    "objective": ("Objectives", ["sdtune/diffusion/objective.py"]),
}
"""Page -> title, and the modules whose docstrings it shows."""


class Stage:
    """The folder that Zensical reads, filled page by page; what a page links to follows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[Path] = set()

    def add(self, path: Path) -> None:
        """Put the page of a file or folder of the repository there, once."""
        if path in self.done:
            return
        self.done.add(path)
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix in LANGUAGES)
            text = f"# {path.relative_to(ROOT)}/\n\n" + "".join(f"- [{f.name}]({f.name})\n" for f in files)
            self.write(path / "index.md", self.linked(text, path))
        elif path.suffix == ".md":
            self.write(path, self.linked(path.read_text(encoding="utf-8"), path.parent))
        elif path.suffix in COPIED:
            self.place(path).write_bytes(path.read_bytes())
        else:
            code = path.read_text(encoding="utf-8")
            head = f"---\nsearch:\n  exclude: true\n---\n\n# {path.relative_to(ROOT)}\n\n"
            fence = f"````{LANGUAGES.get(path.suffix, 'text')}\n{code}````\n"
            self.write(path.with_name(path.name + ".md"), head + fence)

    def linked(self, text: str, folder: Path) -> str:
        """``text`` of a page in ``folder`` with its links leading to pages; what they lead to is added."""

        def to_page(found: re.Match[str]) -> str:
            link = found[1]
            if "://" in link:
                return link
            target = Path(os.path.normpath(folder / unquote(link)))
            if not target.is_relative_to(ROOT) or not target.exists():
                return link  # Zensical, or `unresolved`, says so
            self.add(target)
            if target.is_dir():
                return f"{link.rstrip('/')}/index.md"
            return link if target.suffix in COPIED | {".md"} else f"{link}.md"

        parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
        return "".join(part if k % 2 else LINK.sub(to_page, part) for k, part in enumerate(parts))

    def write(self, path: Path, text: str) -> None:
        self.place(path).write_text(text, encoding="utf-8")

    def place(self, path: Path) -> Path:
        place = self.folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place


def api_page(title: str, sources: list[str]) -> str:
    """A page of the docstrings of ``sources``: Python files, or folders of them."""
    files = [f for source in sources for f in ([ROOT / source] if source.endswith(".py") else package(ROOT / source))]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]
    return f"# {title}\n\n" + "".join(f"::: {name}\n\n" for name in names)


def package(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.py"))


class References(HTMLParser):
    """Everything that a page of HTML refers to: ``links`` for the reader, ``assets`` that a browser fetches itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a":
            self.links += [given["href"] or ""] if "href" in given else []
        elif tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        else:
            self.assets += [value for name in ("src", "href") if (value := given.get(name))]


def search_from_disk(site: Path) -> None:
    """Put our script in the place of the one for searching from disk, which pages would fetch from a network."""
    shutil.copy(SETTINGS / "file-worker.js", site)
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        way = "../" * (len(page.relative_to(site).parts) - 1)
        page.write_text(text.replace(FETCHED, f"{way}file-worker.js"), encoding="utf-8")


def problems(site: Path) -> list[str]:
    """What is wrong with a built site: files that are not there, and assets that would come from a network."""
    found = []
    for page in sorted(site.rglob("*.html")):
        references = References(page.read_text(encoding="utf-8"))
        for asset in references.assets:
            if urlsplit(asset).netloc:
                found.append(f"{page.relative_to(site)}: fetches {asset}")
        for target in (*references.links, *references.assets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or not parts.path or page.name == "404.html":
                continue
            if not (page.parent / unquote(parts.path)).exists():
                found.append(f"{page.relative_to(site)}: no file {target}")
    return found


def main() -> int:
    for folder in ("pages", "site"):
        shutil.rmtree(BUILD / folder, ignore_errors=True)
    stage = Stage(BUILD / "pages")
    for page in pages():
        stage.add(page)
    for name, (title, sources) in API.items():
        stage.write(ROOT / "api" / f"{name}.md", api_page(title, sources))
    shutil.copy(SETTINGS / "extra.css", BUILD / "pages")
    shutil.copy(SETTINGS / "zensical.toml", BUILD)
    built = subprocess.run([Path(sys.executable).parent / "zensical", "build", "--clean", "--strict"], cwd=BUILD)
    if built.returncode:
        return built.returncode
    search_from_disk(BUILD / "site")
    for problem in (found := problems(BUILD / "site")):
        print(problem, file=sys.stderr)
    if not found:
        print(f"{BUILD.relative_to(ROOT)}/site/index.html")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
