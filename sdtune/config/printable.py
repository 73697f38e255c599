"""Untrusted text on a terminal: names of files and tensors, metadata, captions may hold sequences that control it."""


def printable(text: str, lines: bool = True) -> str:
    """``text`` with every control and invisible character as its escape, such as ``\\x1b``.

    Args:
        lines: leave line breaks as they are; otherwise they become escapes as well.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else _escape(c) for c in text)


def _escape(character: str) -> str:
    return ascii(character)[1:-1]
