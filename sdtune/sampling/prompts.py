"""The prompts of ``sdtune sample``: those of the command line, and a file with one on each line.

A line may end in options for its own image, written as in kohya's sd-scripts: ``a red car --n blurry --w 512 --h 768
--d 7 --l 7.5 --s 30``. ``--before`` and ``--after`` are captions of an edit, for ``sdtune evaluate`` alone. Lines that
begin with ``#`` are comments.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sdtune.config.errors import UserError
from sdtune.config.verbs import SampleConfig

OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "n": ("negative_prompt", str, "text"),
    "w": ("width", int, "a number of pixels, at least 8"),
    "h": ("height", int, "a number of pixels, at least 8"),
    "d": ("seed", int, "a whole number from 0 on"),
    "l": ("guidance_scale", float, "a number from 0 on"),
    "s": ("steps", int, "a whole number from 1 on"),
    "cn": ("image", str, "an image file"),
    "before": ("text_before", str, "a caption of that image"),
    "after": ("text_after", str, "a caption of what the edit is to show"),
}
"""Option of a line to the field that it sets, its type, and what it takes in words."""
LEAST = {"width": 8, "height": 8, "seed": 0, "guidance_scale": 0, "steps": 1}
ELSEWHERE = {"ss": "--scheduler is for all prompts", "ctr": "--control has a scale, which is for all prompts"}
"""Options of kohya's that have no place in a line here, with the reason."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the settings of its own image."""

    text: str
    settings: dict[str, Any] = field(default_factory=dict)


def read_prompts(cfg: SampleConfig) -> list[Prompt]:
    """The prompts of ``cfg`` and then those of its file, without blank lines and comments."""
    prompts = [Prompt(text) for text in cfg.prompt]
    if cfg.prompt_file is None:
        return prompts
    asked = f"--prompt-file {cfg.prompt_file}"
    try:
        lines = cfg.prompt_file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{asked}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{asked}: not UTF-8 at byte {error.start}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [parse(line, f"{asked}:{number}") for number, line in numbered if line and not line.startswith("#")]
    if not prompts and not found:
        raise UserError(f"{asked}: no prompt in it")
    return prompts + found


def parse(line: str, where: str) -> Prompt:
    """The prompt of a line; ``UserError`` that begins with ``where`` for an option that is unknown or has no value."""
    text, *options = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line)
    settings: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition(" ")
        if name not in OPTIONS:
            why = ELSEWHERE.get(name, f"known are {', '.join(f'--{known}' for known in OPTIONS)}")
            raise UserError(f"{where}: --{name} is no option of a prompt's line; {why}")
        key, kind, words = OPTIONS[name]
        try:
            settings[key] = kind(value.strip())
            if not settings[key] >= LEAST.get(key, settings[key]) or settings[key] == float("inf"):
                raise ValueError
        except ValueError:
            raise UserError(f"{where}: --{name} takes {words}, not {value.strip()!r}") from None
    if ("width" in settings) != ("height" in settings):
        raise UserError(f"{where}: --w and --h: give both, or neither for the base's own")
    return Prompt(text.strip(), settings)
