"""Reads local and remote files: a path from disk, a URL by byte range.

``http(s)://`` uses the client of ``huggingface_hub``, which is installed anyway and keeps connections open; fsspec's
own HTTP client needs one more package. All other URLs (``hf://``, ``s3://``, ...) go through fsspec.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile

from sdtune.config.sections import RunFailed, UserError
from sdtune.config.untrusted import hide_secrets
from sdtune.data.cache_folder import local_stamp

TRIES = 4
"""How often a read over the network is tried, after waits of one, two and four seconds."""


def is_remote(path: str) -> bool:
    return "://" in path


def name_of(path: str) -> str:
    """The last part of a path or URL; of a signed URL without the signature and what comes with it."""
    signed = is_remote(path) and hide_secrets(path) != path
    return (path.partition("?")[0] if signed else path).rpartition("/")[2]


class HttpFileSystem:
    """Files on a web server that serves byte ranges."""

    def info(self, url: str) -> dict[str, Any]:
        answer = _request(url, 0, 1)
        size = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        return {"size": size and int(size[1]), "ETag": answer.headers.get("ETag")}

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        """Bytes ``[start, end)``. Raises: OSError that gives the reason."""
        content: bytes = _request(url, start, end).content
        return content

    def open(self, url: str, mode: str) -> "HttpFile":
        return HttpFile(self, url, mode, size=self.info(url)["size"])


class HttpFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        content: bytes = self.fs.cat_file(self.path, start, min(end, self.size))
        return content


def _request(url: str, start: int, end: int) -> Any:
    from huggingface_hub import get_session

    answer = get_session().get(url, headers={"Range": f"bytes={start}-{end - 1}"})
    if answer.status_code in (404, 410):
        raise FileNotFoundError(url)
    if answer.status_code == 200:
        raise OSError("the server does not serve byte ranges; copy the shards to a disk")
    if answer.status_code != 206:
        raise OSError(f"the server answers {answer.status_code}")
    return answer


def file_system(url: str) -> tuple[Any, str]:
    """The file system that reads a URL, and the path inside it."""
    if re.match(r"https?://", url):
        return HttpFileSystem(), url
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        return system, str(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"--dataset {url}: {str(error).splitlines()[0]}") from None


def open_file(path: str) -> Any:
    """Open the file at a path or URL for reading."""
    if not is_remote(path):
        return Path(path).open("rb")
    system, inner = file_system(path)
    return system.open(inner, "rb")


def file_stamp(path: str) -> str:
    """A text that changes when the file changes. Raises: OSError if the file or its size cannot be had."""
    if not is_remote(path):
        return local_stamp(Path(path))
    system, inner = file_system(path)
    facts = system.info(inner)
    if not facts.get("size"):
        raise OSError("the server does not tell the size of the file, so a part of it cannot be read")
    return repr([facts.get(name) for name in ("size", "ETag", "etag", "blob_id", "LastModified", "mtime")])


def read_with_retries(path: str, read: Callable[[], Any]) -> Any:
    """The result of ``read()``, which is called again when the network fails.

    Raises:
        UserError: the file is gone.
        RunFailed: all tries failed.
    """
    for attempt in range(TRIES):
        try:
            return read()
        except FileNotFoundError:
            raise UserError(f"{path} was there when training began, but is not now; put it back and continue") from None
        except Exception as error:  # each file system raises other errors
            reason = str(error) or type(error).__name__
            if attempt < TRIES - 1:
                time.sleep(2**attempt)
    raise RunFailed(f"{path} cannot be read: {reason}; the last checkpoint is complete, the same command continues")
