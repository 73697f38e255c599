"""Settings and texts of a run as others may read them: without paths of this machine."""

import re
from pathlib import Path

from sdtune.config.sections import Hub
from sdtune.run.public_name import public_name
from sdtune.run.settings import RunSettings

NAMES_DATA = ("model", "vae", "dataset")
"""Options that name a model or a dataset: a local path, or an id on the Hub."""


def redact(settings: RunSettings) -> RunSettings:
    """``settings`` with paths cut to their last part, and without where the run was published."""
    shown = {}
    for name, value in settings.values.items():
        if name == "cache_dir" or name in Hub.model_fields:
            shown[name] = settings.defaults.get(name)
        elif isinstance(value, str):
            is_path = name in settings.paths
            shown[name] = Path(value).resolve().name if is_path else public_name(value, name in NAMES_DATA)
        else:
            shown[name] = value
    base = settings.about.base
    return settings._replace(values=shown, about=settings.about._replace(base=public_name(base) if base else None))


def hide_paths(text: str, settings: RunSettings) -> str:
    """``text`` with the absolute paths of ``settings``, and the home folder, as `redact` shows them."""
    out = settings.out.resolve()
    known = {str(Path.home()): "~", str(out): out.name}
    shown = redact(settings).values
    for name, value in settings.values.items():
        if isinstance(value, str) and Path(value).is_absolute() and shown[name] != value:
            known[value] = str(shown[name] or name)
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, known[path]) if len(path) > 1 else text
    return re.sub(r"(sdtune run '?)/[^\s']*/", r"\1", text)  # the file of a recipe of one's own
