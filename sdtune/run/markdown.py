"""Texts that others wrote, in Markdown, from which they cannot break out."""

import re


def code_span(text: str) -> str:
    """``text`` as inline code: on one line, between more backticks than it has in a row."""
    line = " ".join(text.split())
    ticks = "`" * (longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fence(text: str, language: str) -> str:
    """``text`` as a block of code, between more backticks than it has in a row."""
    ticks = "`" * max(3, longest_run(text) + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def heading(text: str) -> str:
    """``text`` as a heading of one line, with the marks of links, code and HTML escaped."""
    return "# " + re.sub(r"([\\`\[\]<>])", r"\\\1", " ".join(text.split()))


def longest_run(text: str) -> int:
    """The most backticks in a row."""
    return max((len(run) for run in re.findall("`+", text)), default=0)
