"""Text that others wrote (file names, metadata, the command line) as it may be printed, and secrets in addresses."""

import re
import sys
from collections.abc import Iterator
from typing import Any

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters but tab and newline, and bytes that are no UTF-8."""
UNSEEN = re.compile(f"{CONTROL.pattern}|[\r\u2028-\u202e\u2066-\u2069]")
"""And characters that break a line or reverse the direction of what follows."""
PASSWORD = re.compile(r"(\b[A-Za-z][\w+.-]*://(?:[^/\s:@]*:|(?=[^/\s:@]{16,}@)))[^/\s@]+(?=@)")
"""A password in an address, or a name too long for one: a token that stands alone before the host."""
SIGNATURE = re.compile(
    r"([?&;][\w.-]*(?:sig|token|key|secret|passw|credential|auth)[\w.-]*=)(?!REDACTED\b)[^&#;\s'\"]+", re.IGNORECASE
)
REDACTED = "REDACTED"


def printable(text: str, lines: bool = True) -> str:
    """``text`` without characters that a terminal acts on; each becomes its number, such as \\u001b.

    Args:
        lines: leave line breaks as they are; otherwise they become numbers as well, as a value may not begin a line.
    """
    shown = UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return shown if lines else shown.replace("\n", "\\u000a")


def hide_secrets(text: str) -> str:
    """``text`` with passwords and signatures of addresses replaced by REDACTED."""
    return SIGNATURE.sub(rf"\g<1>{REDACTED}", PASSWORD.sub(rf"\g<1>{REDACTED}", text))


def echo(text: object, err: bool = False, end: str = "\n") -> None:
    """Print a text; everything that sdtune prints goes through here."""
    print(printable(hide_secrets(str(text))), file=sys.stderr if err else sys.stdout, end=end, flush=True)


def without_secrets(value: Any) -> Any:
    """A JSON value with the secrets of its texts hidden."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {name: without_secrets(inner) for name, inner in value.items()}
    return [without_secrets(inner) for inner in value] if isinstance(value, list | tuple) else value


def texts_of(value: Any) -> Iterator[str]:
    """The texts in a value of an option."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner)
