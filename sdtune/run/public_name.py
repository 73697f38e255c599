"""Names that may leave this machine: a local path is shown by its last part, a Hub id as it is."""

from pathlib import Path


def is_local_path(text: str, names_data: bool = True) -> bool:
    """Whether a text is a path of this machine.

    Args:
        names_data: the text names a model or a dataset, so that it is a path when it looks like one. Any other text (a
            prompt) is a path only if the file exists.
    """
    try:
        return "/" in text and ((names_data and text[0] in "/~.") or Path(text).expanduser().exists())
    except (OSError, ValueError, RuntimeError):  # too long for a path, with a null byte, or of an unknown user
        return False


def public_name(text: str, names_data: bool = True) -> str:
    """``text``, or the last part of the path that it is; see `is_local_path`."""
    if not is_local_path(text, names_data):
        return text
    path = Path(text).expanduser()
    return path.name if path.name not in ("", "..") else path.resolve().name


def may_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not is_local_path(name) and not Path(name).parent.is_dir()
