"""What may be told of a run where others read it: nothing of this machine."""

import re
from pathlib import Path
from typing import Any

from sdtune.config.sections import Hub


def settings(cfg: Any) -> Any:
    """``cfg`` without this machine's paths (files and folders by their last name), nor where it was published."""
    fields = type(cfg).model_fields
    changed = {name: fields[name].get_default() for name in ("cache_dir", *Hub.model_fields) if name in fields}
    for name in fields:
        value = getattr(cfg, name)
        if isinstance(value, Path):
            changed.setdefault(name, Path(value.resolve().name))
        elif isinstance(value, str) and is_path(value, name in ("model", "vae", "dataset")):
            changed[name] = Path(value).name
    return cfg.model_copy(update=changed)


def hide_paths(text: str, cfg: Any) -> str:
    """``text`` with the absolute paths of ``cfg``, and the home folder, as `settings` shows them."""
    known = {str(Path.home()): "~", str(cfg.output_dir.resolve()): cfg.output_dir.resolve().name}
    shown = settings(cfg)
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        if isinstance(value, Path | str) and Path(value).is_absolute() and getattr(shown, name) != value:
            known[str(value)] = str(getattr(shown, name) or name)
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, known[path]) if len(path) > 1 else text
    return re.sub(r"(sdtune run '?)/[^\s']*/", r"\1", text)  # the file of a recipe of one's own


def is_path(text: str, wanted: bool) -> bool:
    """Whether a text is a path of this machine; one that names a model or data is when it looks like one."""
    try:
        return "/" in text and ((wanted and text[0] in "/~.") or Path(text).expanduser().exists())
    except (OSError, ValueError, RuntimeError):  # too long for a path, or no text of one
        return False


def may_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not is_path(name, True) and not Path(name).parent.is_dir()
