"""The Hugging Face Hub: the repository is checked before training, and uploads are retried.

The token comes from ``HF_TOKEN`` or from the stored login. It is never an option, so that no config, log or checkpoint
can contain it. The files of a push are listed in ``publish``.
"""

import inspect
import json
import mmap
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from sdtune import __version__
from sdtune.config.sections import UserError
from sdtune.config.untrusted import echo
from sdtune.run.settings import RunSettings

TRIES_BEFORE, TRIES = 3, 6
"""Attempts before training, while a person waits, and at its end."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0
"""Seconds between two attempts: twice as long each time, or what the server asks for."""
PATIENCE = 600.0
"""Seconds after which nothing is retried, except during training."""
SILENCE = 60.0
"""Seconds without a byte after which a connection counts as dead. The library itself waits forever."""
SECRET = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
PREFIXES = (b"hf_", b"api_org_")
"""Searched first: 0.9 GB/s on a core, where the expression alone reaches 0.08; a pipeline has several GB."""
TRANSIENT = (408, 409, 412, 425, 429)
"""Statuses below 500 after which a retry may succeed."""

Files = dict[str, Path | bytes]
"""Path in the repository to a file, or to its content."""
T = TypeVar("T")


def connect() -> HfApi:
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    return HfApi(library_name="sdtune", library_version=__version__)


def ready(api: HfApi, settings: RunSettings) -> str:
    """The full name of the run's repository, which exists afterwards and is writable.

    Raises:
        UserError: no token, a bad one, one that may not write there, or a Hub that cannot be reached.
    """
    login = "set HF_TOKEN or run `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        raise UserError("cannot push to the Hub: HF_HUB_OFFLINE is set; unset it, or push later with `sdtune push`")
    if api.token is None and get_token() is None:
        raise UserError(f"cannot push to the Hub: there is no token; {login}")
    try:
        return retrying(lambda: repository(api, settings), TRIES_BEFORE)
    except UserError:
        raise
    except Exception as error:
        advice = {401: f"; {login}", 403: "; see --hub-model-id", 404: "; see --hub-model-id"}
        raise UserError(f"cannot push to the Hub: {why(error)}{advice.get(status_of(error) or 0, '')}") from None


def repository(api: HfApi, settings: RunSettings) -> str:
    """Create the run's repository and branch if they do not exist, and check that they can be written to."""
    user, asked = api.whoami(), settings.hub
    name = asked.hub_model_id or settings.out.resolve().name
    name = name if "/" in name else f"{user['name']}/{name}"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("cannot push to the Hub: this token may only read; make one with the role `write`")
    repo = api.create_repo(name, private=asked.hub_private or None, exist_ok=True).repo_id
    checks_write = "write" in inspect.signature(api.auth_check).parameters  # older clients only check that it exists
    if checks_write and not asked.hub_create_pr:
        api.auth_check(repo, write=True)
    else:
        api.auth_check(repo)
    if asked.hub_revision and not asked.hub_revision.startswith("refs/"):
        api.create_branch(repo, branch=asked.hub_revision, exist_ok=True)
    return repo


def upload(api: HfApi, settings: RunSettings, repo: str, files: Files, message: str) -> str:
    """One commit of those ``files`` that differ from the repository's; the address where it can be seen.

    Raises:
        UserError: a file holds what looks like a token; nothing was sent.
    """
    refuse_secrets(files)
    revision, opens = settings.hub.hub_revision, False
    if settings.hub.hub_create_pr:
        title, user = f"sdtune {settings.method}: {settings.out.resolve().name}", api.whoami()["name"]
        open_ones = api.get_repo_discussions(
            repo, author=user, discussion_type="pull_request", discussion_status="open"
        )
        mine = next((request for request in open_ones if request.title == title), None)
        revision, opens, message = (mine.git_reference, False, message) if mine else (None, True, title)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    for operation in operations:  # one at a time: the library's pool of threads would hold up an interrupted run
        if operation.path_in_repo.endswith((".safetensors", ".png")):
            api.preupload_lfs_files(repo, [operation], revision=revision, create_pr=opens, free_memory=False)
    commit = api.create_commit(repo, operations, commit_message=message, revision=revision, create_pr=opens)
    return str(commit.pr_url or commit.commit_url)


def refuse_secrets(files: Files) -> None:
    token = (get_token() or "").encode()
    for name, content in files.items():
        if isinstance(content, bytes):
            found = holds(content, token)
        elif not content.stat().st_size:
            continue
        else:
            with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                found = holds(whole, token)
        if found:
            raise UserError(f"{name}: holds what looks like an access token (hf_...), so nothing was pushed; remove it")


def holds(content: bytes | mmap.mmap, token: bytes) -> bool:
    """Whether it contains ``token`` (if there is one) or any other access token."""
    for prefix in PREFIXES:
        at = content.find(prefix)
        while at >= 0:
            if SECRET.match(content, at):
                return True
            at = content.find(prefix, at + 1)
    return bool(token) and content.find(token) >= 0


# ---- failures ----------------------------------------------------------------------------------------


def retrying(work: Callable[[], T], tries: int) -> T:
    """``work()``, retried after transient failures; the last failure is raised."""
    start, wait = time.monotonic(), FIRST_WAIT
    for attempt in range(1, tries + 1):
        try:
            get_session().timeout = SILENCE
            return work()
        except Exception as error:
            pause = max(wait, retry_after(error))
            if permanent(error) or attempt == tries or time.monotonic() - start + pause > PATIENCE:
                raise
            warn(f"{why(error)}; trying again in {pause:.0f} s")
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError("unreachable")


def response_of(error: BaseException | None) -> Any:
    """The HTTP response that caused an error; ``None`` for a failed connection."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response  # type: ignore[attr-defined]
        error = error.__cause__
    return None


def status_of(error: BaseException) -> int | None:
    response = response_of(error)
    return None if response is None else int(response.status_code)


def permanent(error: Exception) -> bool:
    """Whether a retry would fail in the same way: a refusal, or a mistake on this side."""
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in TRANSIENT
    # An overloaded server may answer with a page where the library expects JSON
    return isinstance(error, UserError | FileNotFoundError | TypeError) or (
        isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    )


def retry_after(error: Exception) -> float:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: a number, or a date); 0 when it does not."""
    response = response_of(error)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    try:
        return float(text) if text.isdigit() else max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def why(error: Exception) -> str:
    """A failure in one line."""
    response = response_of(error)
    if response is None:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        first = next(iter(str(cause).strip().splitlines()), "")
        return f"{type(cause).__name__}: {first}" if first else type(cause).__name__
    message = (
        getattr(error, "server_message", None) or response.headers.get("X-Error-Message") or response.reason_phrase
    )
    return f"{constants.ENDPOINT} answers {response.status_code}: {str(message).strip().splitlines()[0]}"


def warn(line: str) -> None:
    echo(f"warning: {line}", err=True)
