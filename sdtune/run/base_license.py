"""The license of a base model, as the card says that lies beside it: README.md of its folder or repository."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sdtune.config.sections import Model
from sdtune.run.markdown import code_span
from sdtune.run.public_name import may_be_hub_id, public_name

FORBIDS_USE = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?commercial|research[-_ ]only", re.IGNORECASE)
"""In the name of a license that forbids commercial use."""
MOST = 64_000
"""Characters of a card that are read for its first lines."""


class License(NamedTuple):
    """As the Hub spells it; each is ``None`` where the card does not say."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    @property
    def forbids_use(self) -> str:
        """The name of a license that forbids commercial use; empty for others."""
        names = (self.license_name, self.license)
        return next((name for name in names if name and FORBIDS_USE.search(name)), "")

    def sentence(self) -> str:
        """What it forbids, which holds for what is made from the base; empty for others. Markdown."""
        if not (name := self.forbids_use):
            return ""
        link = f" ({self.license_link})" if self.license_link else ""
        return (
            f"The license of the base, {code_span(name)}{link}, forbids commercial use, also of what is made from it."
        )


def of_metadata(known: dict[str, Any]) -> License:
    """The license that the metadata of a card names; none where it names several."""
    license = known.get("license")
    if isinstance(license, list):
        license = license[0] if len(license) == 1 else None  # of several nobody knows here which holds
    if not isinstance(license, str):
        return License()
    more = (known.get("license_name"), known.get("license_link"))
    return License(license, *(text if isinstance(text, str) else None for text in more))


def of_base(model: str, revision: str | None, cache_dir: Path | None, download: bool = False) -> License:
    """The license of a base in a folder or in the Hub's cache, as its card says; unknown where there is no card.

    Args:
        download: get the card from the Hub if it is not in the cache.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    folder = Path(model).expanduser()
    file: Any = folder / "README.md"
    try:
        if not folder.is_dir():
            file = may_be_hub_id(model) and try_to_load_from_cache(model, file.name, cache_dir, revision)
            if download and file is None:
                file = hf_hub_download(model, "README.md", revision=revision, cache_dir=cache_dir)
        if not isinstance(file, str | Path):
            return License()
        with Path(file).open(encoding="utf-8") as text:
            front = re.match(r"---\s*\n(.*?)\n---", text.read(MOST), re.DOTALL)
        known = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # no card, no network: nothing to tell
        return License()
    return of_metadata(known) if isinstance(known, dict) else License()


def notice(cfg: Any) -> str:
    """A line for the plan of a run on a base whose license forbids commercial use; empty for others."""
    if not isinstance(cfg, Model):
        return ""
    found = of_base(cfg.model, cfg.revision, cfg.cache_dir, download=True)
    if not (name := found.forbids_use):
        return ""
    where = f" ({found.license_link})" if found.license_link else ""
    return f"license: {public_name(cfg.model)} is under {name}{where}, which forbids commercial use, also of adapters"
