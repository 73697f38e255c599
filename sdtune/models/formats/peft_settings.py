"""Rank, alpha and targets from a PEFT config, as its own file or in the metadata of a file; never trusted.

PEFT's patterns are regular expressions, and one can be written that takes years to match. Plain names, which nearly all
are, are compared as text; the others must be short and simple, and all of them together get a few seconds.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdtune.config.sections import UserError

PLAIN = re.compile(r"\^?[\w.\\]+\$?")
LONGEST = 300
"""Characters of a pattern that is not a plain name."""
MOST_REPEATS = 2
"""Repetitions in such a pattern: the time to match grows with the length of a name to this power, plus one."""
SECONDS = 5.0
"""For all such patterns of a file."""


@contextmanager
def errors_of(where: Path | str) -> Iterator[None]:
    """Errors of reading untrusted settings as one ``UserError`` that begins with ``where``."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError, AttributeError, TypeError, re.error) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if isinstance(error, RecursionError):
            text = "nested too deeply"
        raise UserError(f"{where}: its settings of rank and alpha cannot be read ({text})") from None


def settings_of(where: Path | str, text: str) -> dict[str, Any]:
    """A PEFT config from its JSON; ``UserError`` that begins with ``where``."""
    with errors_of(where):
        found = json.loads(text)
        if not isinstance(found, dict):
            raise TypeError("not a JSON object")
        return found


class Scales:
    """(alpha, rank) of each module by a PEFT config, with rsLoRA's root multiplied into alpha."""

    def __init__(self, config: Mapping[str, Any]):
        self.config, self.spent = config, 0.0

    def __call__(self, name: str, rank: int) -> tuple[float, int]:
        """Of the module ``name`` whose tensors have ``rank`` (0 if they do not say).

        Raises:
            ValueError, TypeError, AttributeError, OverflowError, re.error: what the config says is no number, or a
                pattern is too complex.
        """
        config, name = self.config, name.removeprefix("text_model.")
        r = int(self._pick("rank_pattern", name, config.get("r")) or rank or 1)
        default = config.get("lora_alpha", config.get("alpha"))
        alpha = float(self._pick("alpha_pattern", name, default) or r) * (r**0.5 if config.get("use_rslora") else 1)
        if not math.isfinite(alpha) or not 0 < r < 1_000_000:
            raise ValueError(f"rank {r}, alpha {alpha:g}")
        return alpha, r

    def _pick(self, field: str, name: str, default: Any) -> Any:
        for pattern, value in (self.config.get(field) or {}).items():
            if self._matches(pattern.removeprefix("text_model."), name):
                return value
        return default

    def _matches(self, pattern: str, name: str) -> bool:
        if PLAIN.fullmatch(pattern) and not re.search(r"\\[^.]", pattern):
            plain = pattern.replace("\\.", ".").removesuffix("$")
            return name == plain.removeprefix("^") or (plain[:1] != "^" and name.endswith(f".{plain}"))
        began = time.monotonic()
        found = bool(compiled(pattern).match(name))
        self.spent += time.monotonic() - began
        if self.spent > SECONDS:
            raise ValueError(f"its patterns take more than {SECONDS:g} seconds to match")
        return found


@lru_cache(4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of PEFT's, which matches a name or the end of one after a dot.

    Raises:
        ValueError: it is long, or repeats a group, so that matching may take forever.
    """
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > LONGEST or repeats > MOST_REPEATS or re.search(r"\)[*+{?]|\\\d|\(\?", pattern):
        raise ValueError(f"the pattern {pattern[:60]!r} is too complex")
    return re.compile(rf"(.*\.)?({pattern})$")


def targets_of(config: Mapping[str, Any]) -> list[str]:
    """The modules, or ends of their names, that a config lists; empty where it leaves some of them out, or none."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(k) for k in ("exclude_modules", "layers_to_transform")):
        return []
    return [target for target in targets if isinstance(target, str) and target]
