"""Bytes of a file, near or far: a path is read from disk, a URL by range, through fsspec or plain HTTP.

``http(s)://`` goes through the client of ``huggingface_hub``, which is there already and keeps connections open;
fsspec's own wants a package more. Whatever else fsspec knows (``hf://``, ``s3://``, ...) is fsspec's.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile

from sdtune.config.sections import RunFailed, UserError
from sdtune.data.probes import stamp

TRIES = 4
"""Times that a read over the network is tried, with a second, then two, then four between them."""


def remote(path: str) -> bool:
    return "://" in path


class Http:
    """Files on a web server that gives parts of them."""

    def info(self, url: str) -> dict[str, Any]:
        answer = _ask(url, 0, 1)
        size = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        return {"size": size and int(size[1]), "ETag": answer.headers.get("ETag")}

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        """Bytes ``[start, end)``. Raises: OSError that says why not."""
        return _ask(url, start, end).content

    def open(self, url: str, mode: str) -> "HttpFile":
        return HttpFile(self, url, mode, size=self.info(url)["size"])


class HttpFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, min(end, self.size))


def _ask(url: str, start: int, end: int) -> Any:
    from huggingface_hub.utils import get_session

    answer = get_session().get(url, headers={"Range": f"bytes={start}-{end - 1}"})
    if answer.status_code in (404, 410):
        raise FileNotFoundError(url)
    if answer.status_code == 200:
        raise OSError("the server does not give parts of a file; copy the shards to a disk")
    if answer.status_code != 206:
        raise OSError(f"the server answers {answer.status_code}")
    return answer


def system_of(url: str) -> tuple[Any, str]:
    """What reads a URL, and its path there."""
    if re.match(r"https?://", url):
        return Http(), url
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"--dataset {url}: {str(error).splitlines()[0]}") from None


def opened(path: str) -> Any:
    """The file at a path or URL, to read."""
    if not remote(path):
        return Path(path).open("rb")
    system, inner = system_of(path)
    return system.open(inner, "rb")


def stamp_of(path: str) -> str:
    """Changes when the file does. Raises: OSError when it is not there, or no part of it can be had."""
    if not remote(path):
        return stamp(Path(path))
    system, inner = system_of(path)
    facts = system.info(inner)
    if not facts.get("size"):
        raise OSError("the server does not say how large it is, so no part of it can be asked for")
    return repr([facts.get(name) for name in ("size", "ETag", "etag", "blob_id", "LastModified", "mtime")])


def patiently(path: str, read: Callable[[], Any]) -> Any:
    """``read()``, tried again when the network fails.

    Raises:
        UserError: the file is gone.
        RunFailed: it goes on failing.
    """
    for attempt in range(TRIES):
        try:
            return read()
        except FileNotFoundError:
            raise UserError(f"{path} was there when training began, but is not now; put it back and continue") from None
        except Exception as error:  # each file system raises kinds of its own
            reason = str(error) or type(error).__name__
            if attempt < TRIES - 1:
                time.sleep(2**attempt)
    raise RunFailed(f"{path} cannot be read: {reason}; the last checkpoint is complete, the same command continues")
