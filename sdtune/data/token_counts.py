"""Remembers how many tokens captions have: to count those of 100,000 takes ten seconds of each start."""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from sdtune.data.cache_folder import cache_root, remember

MANY = 1000
"""Captions whose lengths are worth a file; fewer are counted in a tenth of a second."""


def token_counts(tokenizer: Any, captions: Sequence[str], count: Callable[[Sequence[str]], list[int]]) -> list[int]:
    """``count(captions)``: the length of each in tokens. Those of many captions are remembered, all in one file.

    Args:
        tokenizer: of transformers, on which ``count`` depends and on nothing else.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(captions) < MANY:
        return count(captions)
    # As ``count`` leaves it: both are part of its settings, from which keys of other stores are made
    backend.no_truncation()
    backend.no_padding()
    sha = hashlib.sha256(f"{version('transformers')} {version('tokenizers')} {backend.to_str()}".encode())
    sha.update(json.dumps(list(captions)).encode())
    file = cache_root() / "tokens" / f"{sha.hexdigest()[:32]}.json"
    try:
        known = json.loads(file.read_bytes())
        if len(known) == len(captions) and all(type(length) is int for length in known):
            return list(known)
    except (OSError, ValueError, TypeError):
        pass
    found = count(captions)
    remember(file, found)
    return found
