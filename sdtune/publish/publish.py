"""Publishing a run: which files are uploaded, and when. A failed upload never ends the run.

A push is one commit of named files (`contents`), never of a folder, so it cannot contain a checkpoint, optimizer
state, log, cache or dataset. Unchanged files make no commit, so a push may be repeated.
"""

import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

from huggingface_hub import HfApi, get_session

from sdtune.config.sections import Run, RunFailed, UserError
from sdtune.config.untrusted import echo
from sdtune.config.verbs import PushConfig
from sdtune.publish import hub, model_card
from sdtune.publish.origin import Origin, by_name, look_up
from sdtune.publish.redact import hide_paths
from sdtune.run.artefacts import artefact, by_path, export, of_best
from sdtune.run.folder import sample_sheets
from sdtune.run.settings import RunSettings, read
from sdtune.run.signals import Interrupted

PUSH_FAILED = 3
"""Exit code of `sdtune push` when the upload fails. Training that succeeds exits with 0 even then."""
STAGE = ".push-"
"""Prefix of the folders, in the run's folder, that hold copies of the artefact while they are uploaded."""


def contents(
    settings: RunSettings, repo: str, origin: Origin, weights: dict[str, Path], report: bool = True
) -> hub.Files:
    """All that a push uploads, and nothing else: no checkpoint, optimizer state, log, cache or dataset."""
    out, sheets = settings.out, sample_sheets(settings.out)
    texts = [out / name for name in ("config.yaml", "metrics.jsonl", "report.html", "README.md")]
    refuse_links(out, [*weights.values(), *texts, *sheets])
    text, images = model_card.model_card(settings, out, repo, origin, weights)
    write_card(text, out)
    files: hub.Files = {**weights}
    for name in ("config.yaml", "metrics.jsonl", *(["report.html"] if report else [])):
        if (out / name).is_file():
            files[name] = hide_paths((out / name).read_text(encoding="utf-8"), settings).encode()
    files |= {f"samples/{path.name}": path for path in (*sheets[:1], *sheets[-1:])}  # the report has those between
    return files | images | {"README.md": text.encode()}


def refuse_links(out: Path, files: Iterable[Path]) -> None:
    """A run's folder may be somebody's: a link in it must not publish a file of this machine.

    Raises:
        UserError: a file of the run lies outside of its folder.
    """
    for file in files:
        if not file.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{file}: a link out of the run's folder, so nothing was pushed; copy the file into it")


def write_card(text: str, out: Path) -> None:
    try:
        model_card.save(text, out / "README.md")
    except OSError as error:
        raise RunFailed(
            f"{out / 'README.md'}: cannot be written ({error.strerror}); the artefact is complete; "
            f"when there is room, `{shlex.join(['sdtune', 'push', str(out)])}` writes the card and uploads"
        ) from error


def push_run(asked: PushConfig) -> None:
    """``sdtune push RUN``: upload a finished run as its config says; options of ``asked`` take precedence.

    Raises:
        UserError: there is no run, no artefact yet, no access, or a file holds a secret.
        SystemExit: `PUSH_FAILED` when the Hub cannot be reached or refuses the upload.
    """
    given = {name: getattr(asked, name) for name in asked.model_fields_set - {"run", "best"}}
    if given.get("hub_revision"):
        given.setdefault("hub_create_pr", False)
    if given.get("hub_create_pr"):
        given.setdefault("hub_revision", None)
    settings = read(asked.run).changed(given | {"output_dir": str(asked.run)})
    place = of_best("RUN", asked.run) if asked.best else asked.run
    weights = by_path(place, artefact(place))
    if not weights:
        raise UserError(f"{asked.run}: no artefact in it yet; the run writes it when it ends")
    api = hub.connect()
    repo = hub.ready(api, settings)
    if not publish(api, settings, repo, look_up(api, settings), weights):
        raise SystemExit(PUSH_FAILED)


def publish(api: HfApi, settings: RunSettings, repo: str, origin: Origin, weights: dict[str, Path]) -> bool:
    """Push the finished run; False, after a message with the command that finishes it, when that fails."""
    files = contents(settings, repo, origin, weights)
    try:
        url = hub.retrying(lambda: hub.upload(api, settings, repo, files, f"sdtune {settings.method}"), hub.TRIES)
    except UserError:
        raise
    except Exception as error:
        give_up(settings.out, hub.why(error))
        return False
    echo(f"pushed: {url}")
    return True


def give_up(out: Path, reason: str) -> None:
    command = shlex.join(["sdtune", "push", str(out)])
    hub.warn(f"not pushed: {reason}\nthe run is complete in {out}; this command finishes the push: {command}")


# ---- during training ---------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    step: int
    folder: Path
    files: hub.Files


class Publisher:
    """The uploads of a run. It does nothing on other processes than the first, and for a run that does not push.

    Raises:
        UserError: the run asks for uploads that cannot succeed; see `ready`.
    """

    def __init__(self, cfg: Run, main: bool):
        self.settings, self.out, self.main = RunSettings.of(cfg), cfg.output_dir, main
        asked = self.settings.hub
        self.api = hub.connect() if main and asked.push_to_hub else None
        self.each_checkpoint = asked.push_to_hub and asked.hub_strategy == "checkpoint"
        if self.api:
            hub.refuse_secrets({"config.yaml": self.settings.to_yaml().encode()})
            self.repo = hub.ready(self.api, self.settings)
            self.origin = look_up(self.api, self.settings)
        self.lock, self.closing = Lock(), Event()
        self.waiting: Snapshot | None = None
        self.thread: Thread | None = None

    def checkpoint(self, state: Any) -> None:
        """Export the current artefact and upload it in a thread. Of several that wait, only the newest is uploaded.

        Called by every process, since each may hold a slice of the weights.
        """
        if self.each_checkpoint:
            with state.export_weights() as recipe:
                if self.api:
                    self._checkpoint(recipe, state.step)

    def _checkpoint(self, recipe: Any, step: int) -> None:
        stage = self.out / f"{STAGE}{step:06d}"
        try:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
            weights = by_path(stage, export(recipe, stage))
            files = contents(self.settings, self.repo, self.origin, weights, report=False)
        except Exception as error:  # such as a full disk; if it concerns the run, the next checkpoint fails
            shutil.rmtree(stage, ignore_errors=True)
            hub.warn(f"step {step} is not pushed: {error}")
            return
        with self.lock:
            dropped, self.waiting = self.waiting, Snapshot(step, stage, files)
            if self.thread is None:
                self.thread = Thread(target=self._uploads, name="push", daemon=True)
                self.thread.start()
        if dropped:
            shutil.rmtree(dropped.folder, ignore_errors=True)

    def _uploads(self) -> None:
        """The thread: upload until nothing waits. After a failure the newest snapshot is retried later."""
        wait, title = hub.FIRST_WAIT, f"sdtune {self.settings.method}"
        while True:
            with self.lock:
                now, self.waiting = self.waiting, None
                if now is None or self.closing.is_set():
                    self.thread = None
                    break
            try:
                get_session().timeout = hub.SILENCE
                assert self.api is not None
                hub.upload(self.api, self.settings, self.repo, now.files, f"{title}: step {now.step}")
                wait = hub.FIRST_WAIT
            except Exception as error:  # no failed upload may end the run
                hub.warn(f"step {now.step} is not pushed: {hub.why(error)}; training goes on")
                with self.lock:
                    if self.waiting is None and not hub.permanent(error):
                        self.waiting, now = now, None
                self.closing.wait(max(wait, hub.retry_after(error)))
                wait = min(2 * wait, hub.LONGEST_WAIT)
            if now:
                shutil.rmtree(now.folder, ignore_errors=True)
        if now:
            shutil.rmtree(now.folder, ignore_errors=True)

    def finish(self) -> None:
        """Write the card of a finished run and push it if the run asks for that; see `publish`."""
        out = self.out
        weights = by_path(out, artefact(out)) if self.main else {}
        if not weights:
            return
        if not self.api:
            write_card(model_card.model_card(self.settings, out, None, by_name(self.settings), weights)[0], out)
            return
        try:
            self.closing.set()
            if thread := self.thread:
                thread.join()
            for stale in out.glob(f"{STAGE}*"):
                shutil.rmtree(stale, ignore_errors=True)
            publish(self.api, self.settings, self.repo, self.origin, weights)
        except Interrupted as signal:  # the run itself has ended well
            give_up(out, f"interrupted by {signal.name}")
