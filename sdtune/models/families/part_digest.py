"""Digests of the parts of a base, remembered by the files that hold them: a warm run reads no frozen weights.

The digest of a part is that of its weights (`data.cache.weights_digest`). It is kept in the cache under the identity of
the part's files: name, size, time of change and inode, as for images. Files that change get another identity.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache

from sdtune.data import cache_root
from sdtune.data.cache import digest, make_folder


def remembered(identity: Callable[[], str | None], compute: Callable[[], str]) -> str:
    """The digest that was computed for these files before, else ``compute()``, which is remembered.

    Args:
        identity: of the files (`identity_of`); ``None`` where they are not known, as before they are downloaded.
    """
    known = identity()
    if known is not None:
        with suppress(OSError, ValueError):
            return (cache_root() / "digests" / known).read_text(encoding="ascii")
    found = compute()
    known = known or identity()
    if known is None:
        return found
    file = cache_root() / "digests" / known
    make_folder(file.parent)
    new = file.with_name(f"{known}.{os.getpid()}.tmp")
    new.write_text(found, encoding="ascii")
    new.replace(file)
    return found


def identity_of(folder: Path | None, *parts: Any) -> str | None:
    """A digest of the files in ``folder`` and of all else that the weights in memory depend on: ``parts``, versions.

    None where no weights are there, as in the Hub's cache after the settings alone were asked for.
    """
    if folder is None or not any(folder.glob("*.safetensors")):
        return None
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    stats = [(file, file.stat()) for file in files]
    known = [(f.relative_to(folder).as_posix(), s.st_size, s.st_mtime_ns, s.st_ino) for f, s in stats]
    versions = torch.__version__, diffusers.__version__, transformers.__version__
    return digest(*map(str, parts), *versions, *known)


def part_folder(source: str, subfolder: str | None, revision: str | None, cache_dir: Path | None) -> Path | None:
    """Where a part lies on this machine: in the folder of its pipeline, or in the Hub's cache; None if nowhere."""
    if Path(source).is_dir():
        return Path(source, subfolder or "")
    found = try_to_load_from_cache(source, f"{subfolder or ''}/config.json".lstrip("/"), cache_dir, revision)
    return Path(found).parent if isinstance(found, str) else None
