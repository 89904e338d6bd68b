"""The task in hand: its job is made out, its worker watched, its result kept and read for the upload."""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from fedoap.config import SiteConfig
from fedoap.errors import FedoapError, TensorsError
from fedoap.manifests import TaskManifest, UploadManifest
from fedoap.messages import MAX_BODY_BYTES
from fedoap.protocol.course import Step
from fedoap.protocol.events import SiteEvent, WorkDone, WorkFailed, WorkProgress
from fedoap.seal import Seal, public_half
from fedoap_node.files import remove
from fedoap_node.job import JOB, write_job
from fedoap_node.journal import Journal
from fedoap_node.results import Result
from fedoap_node.standby import Standby
from fedoap_node.state import SiteState
from fedoap_node.trainer import GRACE_SECONDS, Trainer

LEAST_PATIENCE_SECONDS = 900.0
"""A worker may be silent for this long, whatever the deadline: it imports, and prepares images, without a word."""


@dataclass(slots=True)
class _Running:
    """A worker, what it works on, and where it writes."""

    task: bytes
    manifest: TaskManifest
    output: Path
    trainer: Trainer
    started: float
    kill_at: float = 0.0
    wanted: bool = True


@dataclass(slots=True)
class _Upload:
    """A result on its way: where its bytes are, and what seals them."""

    blob: bytes
    descriptor: int
    seal: Seal
    sent: int = 0


class Work:
    """At most one task's work at a time; what is asked to end may take a while to be gone."""

    def __init__(self, state: SiteState, config: SiteConfig, journal: Journal) -> None:
        self._state, self._config, self._journal = state, config, journal
        self._running: _Running | None = None
        self._ending: list[_Running] = []
        self._upload: _Upload | None = None
        self._standby, self._is_over = Standby(config.worker, state.folder.worker_log), False

    def start(self, task: bytes, manifest: TaskManifest) -> SiteEvent | None:
        """Start a worker on the task, and return how it ended if that is known already.

        A result that is kept for the same work is taken as it is, and a worker that is busy with it goes on.
        """
        running = self._running
        if running is not None and running.manifest.work == manifest.work and not self._hangs(running):
            running.task, running.manifest, running.wanted = task, manifest, True
            return None
        self.stop()
        self.settle()
        kept = self._state.finished(manifest)
        if kept is not None:
            self._journal.note("work_kept", f"{_name(manifest)} was done before", kind=manifest.kind)
            return self._done(task, manifest, kept)
        try:
            self._running = self._launch(task, manifest)
        except (FedoapError, OSError) as error:
            return self._failed(task, manifest, str(error), "the worker could not be started")
        self._journal.note("work_started", f"{_name(manifest)} begins", kind=manifest.kind, round=manifest.round)
        return None

    def stop(self) -> None:
        """The task in hand is no longer due; its worker ends at `settle` unless the same work is started again."""
        if self._running is not None:
            self._running.wanted = False

    def settle(self) -> None:
        """End a worker that nobody wants any more, bury those that were asked to end, let the next one wait."""
        if self._running is not None and not self._running.wanted:
            self._running.trainer.ask_to_end()
            self._running.kill_at = time.monotonic() + GRACE_SECONDS
            self._ending.append(self._running)
            self._running = None
        for running in list(self._ending):
            if running.trainer.exit_code() is not None or time.monotonic() > running.kill_at:
                running.trainer.kill()
                remove(running.output)
                self._ending.remove(running)
        if self._running is None and not self._is_over:
            self._standby.prepare()

    def rest(self, *, over: bool) -> None:
        """Let no worker wait while the federation is over."""
        self._is_over = over
        if over:
            self._standby.close()

    def news(self) -> list[SiteEvent]:
        """Return what the worker has to say: how far it is, and how it ended."""
        running = self._running
        if running is None:
            return []
        events: list[SiteEvent] = []
        said = running.trainer.progress()
        if said is not None:
            events.append(WorkProgress(said.stage, said.step, said.steps, said.loss, said.dice))
        done = running.trainer.has_done()
        code = 0 if done else running.trainer.exit_code()
        if code is not None:
            self._running = None
            if done:
                self._standby.keep(running.trainer)
            else:
                running.trainer.kill()  # the worker is gone; what it started may not be
            events.append(self._finish(running, code))
        return events

    def descriptors(self) -> list[int]:
        """Return the descriptors that become readable when there is news."""
        return self._running.trainer.descriptors() if self._running else []

    def chunk(self, blob: bytes, at: int, size: int) -> bytes:
        """Return a sealed chunk of the last result's blob; nothing if the blob is another one."""
        upload = self._upload
        if upload is None or upload.blob != blob:
            return b""
        upload.sent += size
        return upload.seal.close(at, os.pread(upload.descriptor, size, at))

    def committed(self, manifest: TaskManifest) -> None:
        """Say that the coordinator holds the result, and how many of its bytes this daemon sent for that."""
        sent = self._upload.sent if self._upload else 0
        said = f"{_name(manifest)} is at the coordinator"
        self._journal.note("result_committed", said, kind=manifest.kind, round=manifest.round, sent=sent)
        if self._upload:
            self._upload.sent = 0

    def close(self) -> None:
        """End every worker; returns when all are gone."""
        self.rest(over=True)
        self.stop()
        self.settle()
        for running in self._ending:
            running.trainer.end()
            remove(running.output)
        self._ending.clear()
        self._close_upload()

    def _launch(self, task: bytes, manifest: TaskManifest) -> _Running:
        plan = self._state.plan()
        size = manifest.model.size if manifest.model and manifest.kind == "train" else 0
        output = self._state.results.start(manifest.work, size, packs=plan.wire.updates == "packed")
        try:
            write_job(
                manifest,
                site=self._state.folder.name,
                plan=plan,
                config=self._config,
                blobs=self._state.blobs.files,
                personal=self._state.results.personal,
                cache=self._state.cache,
                output=output,
            )
            trainer = self._standby.take(output / JOB)
        except (FedoapError, OSError):
            remove(output)
            raise
        return _Running(task, manifest, output, trainer, time.monotonic())

    def _hangs(self, running: _Running) -> bool:
        """Return whether a worker has said nothing for longer than a whole attempt may take; slow ones report steps."""
        silent = running.trainer.silent_seconds()
        if silent <= max(running.manifest.deadline_seconds, LEAST_PATIENCE_SECONDS):
            return False
        said = f"{_name(running.manifest)}: the worker has said nothing for {silent:.0f} s, so a fresh one begins"
        self._journal.note("work_hangs", said, level="warning", kind=running.manifest.kind)
        return True

    def _finish(self, running: _Running, code: int) -> SiteEvent:
        seconds = round(time.monotonic() - running.started, 3)
        task, manifest = running.task, running.manifest
        if code != 0:
            words = running.trainer.last_words()
            remove(running.output)
            return self._failed(task, manifest, f"{words} ({_ending(code)})", f"the worker {_ending(code)}")
        try:
            result = self._state.results.finish(manifest.work, running.output)
        except (FedoapError, OSError) as error:
            remove(running.output)
            return self._failed(task, manifest, str(error), "the worker's result cannot be used")
        said = f"{_name(manifest)} is done after {seconds:.1f} s"
        self._journal.note("work_done", said, kind=manifest.kind, round=manifest.round, seconds=seconds)
        return self._done(task, manifest, result)

    def _done(self, task: bytes, manifest: TaskManifest, result: Result) -> WorkDone | WorkFailed:
        self._close_upload()
        upload = UploadManifest(task, self._state.folder.name, result.cases, result.metrics, result.blob)
        if not result.blob.size:
            return WorkDone(task, upload)
        try:
            secret = self._state.results.seal_secret(manifest.work, task)
            upload = replace(upload, seal_key=public_half(secret))
            if (size := len(upload.pack())) > MAX_BODY_BYTES:
                raise TensorsError(f"result's manifest has {size} bytes, but a message holds {MAX_BODY_BYTES}")
            seal = Seal.of_site(upload, secret, manifest.seal_key)
            self._upload = _Upload(result.blob.id, os.open(result.path, os.O_RDONLY), seal)
        except (FedoapError, OSError) as error:
            return self._failed(task, manifest, str(error), "the result could not be sealed")
        return WorkDone(task, upload)

    def _failed(self, task: bytes, manifest: TaskManifest, inside: str, outside: str) -> WorkFailed:
        """Tell the site's own people all, and the coordinator nothing that may name a patient or a path."""
        self._journal.note("work_failed", f"{_name(manifest)} failed: {inside}", level="error", reason=inside)
        return WorkFailed(task, f"{outside}; the site's own log says why")

    def _close_upload(self) -> None:
        if self._upload is not None:
            os.close(self._upload.descriptor)
            self._upload = None


def _name(manifest: TaskManifest) -> str:
    return str(Step(manifest.kind, manifest.round))


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}" + (
        ", perhaps out of memory" if code == -signal.SIGKILL else ""
    )
