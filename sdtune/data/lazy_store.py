"""A store that is filled while a run trains, so that its first step does not wait until all images are encoded."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from sdtune.data import cache, cache_root


class Config(Protocol):
    lazy_cache: bool


def encoded_images(
    cfg: Config,
    name: str,
    source: Callable[[], str] | None,
    keys: Iterable[str],
    encode: Callable[[str], Tensor],
    complete: Callable[[], None] = lambda: None,
) -> Mapping[str, Tensor]:
    """What ``encode`` gives of images: all before the first step, or with ``--lazy-cache`` each when it is first read.

    Args:
        name, source, keys: as `cache.cached_tensors` takes them.
        complete: called once a lazy store has all tensors.
    """
    if source is None or not cfg.lazy_cache:
        return cache.cached_tensors(name, source, keys, encode, "Encoding images")
    return LazyStore(name, source(), keys, encode, complete)


class LazyStore(Mapping[str, Tensor]):
    """Tensors by key, each of which is computed when it is first read, and stored for later runs.

    Like those of `cache.fill`, they are computed one at a time, so that they have the same bits. They are written
    `cache.CHUNK` at a time, and when all are known; what other processes have written is not computed again.

    Args:
        name: of the store in the cache.
        source: a digest of all that ``compute`` depends on except the key.
        complete: called once all tensors are known to this process.
    """

    def __init__(
        self,
        name: str,
        source: str,
        keys: Iterable[str],
        compute: Callable[[str], Tensor],
        complete: Callable[[], None],
    ):
        self.folder, self.keys_of_run = cache_root() / name / source, list(keys)
        self.compute, self.complete = compute, complete
        self.unwritten: dict[str, Tensor] = {}
        cache.make_folder(self.folder)
        self._list()

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.stored and key not in self.unwritten and self._changed:
            self._list()
        if key in self.stored:
            return self.stored[key]
        if key not in self.unwritten:
            self.unwritten[key] = self.compute(key).cpu().contiguous()
            self.missing.discard(key)
            found = self.unwritten[key]
            if len(self.unwritten) == cache.CHUNK or not self.missing:
                self._write()
            return found
        return self.unwritten[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of_run)

    def __len__(self) -> int:
        return len(self.keys_of_run)

    @property
    def _changed(self) -> bool:
        return self.folder.stat().st_mtime_ns != self.listed

    def _list(self) -> None:
        """Learn what is stored."""
        self.listed = self.folder.stat().st_mtime_ns  # before, so that nothing written meanwhile is overlooked
        self.stored = cache.Store(self.folder)
        self.missing = set(self.keys_of_run) - self.stored.keys() - self.unwritten.keys()
        if not self.missing:
            self.complete()

    def _write(self) -> None:
        """Store what has been computed."""
        cache.write_tensors(self.folder / f"{cache.digest(*sorted(self.unwritten))}.safetensors", self.unwritten)
        self.unwritten = {}
        self._list()
