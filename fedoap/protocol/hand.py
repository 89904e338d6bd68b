"""What a site has in hand: at most one task, from the blobs that it needs to the commit of its result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedoap.manifests import TaskManifest
from fedoap.messages import Commit, Credit, Failed, Go, Progress, RefusalCode, Refuse, Wait
from fedoap.protocol.events import Committed, Note, Say, SiteEffect, StartWork, StopWork, WorkDone, WorkProgress
from fedoap.protocol.fetching import Fetching
from fedoap.protocol.offering import Offering

REPEAT_SECONDS = 5.0
"""How often a failure is reported until it is acknowledged."""
MOST_TEXT = 500
OVER_CODES: frozenset[RefusalCode] = frozenset({"late", "unknown_task", "foreign", "duplicate"})
"""Refusals of a result that nobody waits for any more; any other says that the result itself is wrong."""

Effects = list[SiteEffect]


@dataclass(slots=True)
class _Work:
    """One task; `running` is what the worker was told, which may be an earlier attempt at the same work."""

    task: bytes
    manifest: TaskManifest
    stage: Literal["fetching", "working", "offering", "failing"] = "fetching"
    running: bytes = b""
    offering: Offering | None = None
    reason: str = ""
    say_failed_at: float = 0.0


class Hand:
    """The task in hand; an event about any other changes nothing."""

    def __init__(self, signing_key: bytes, have: frozenset[bytes], partly: Mapping[bytes, int]) -> None:
        self.fetching = Fetching(have, partly)
        self.last = b""
        """The task that was brought to its end last: nobody needs it again."""
        self._signing_key = signing_key
        self._work: _Work | None = None

    @property
    def task(self) -> bytes:
        """The task's name, or nothing."""
        return self._work.task if self._work else b""

    @property
    def is_offering(self) -> bool:
        """Whether a result is on its way."""
        return self._work is not None and self._work.offering is not None

    def take(self, task: bytes, manifest: TaskManifest) -> Effects:
        """Take up another task; work under way for an earlier attempt at the same goes on.

        What was fetched for other tasks goes, whatever became of them: a site that is always late would fill its disk.
        """
        old, fresh = self._work, _Work(task, manifest)
        self._work = fresh
        fetched = [*self.fetching.want(manifest.blobs), *self.fetching.keep(manifest.blobs)]
        if old is None or old.stage != "working":
            return fetched
        if old.manifest.work == manifest.work:
            fresh.stage, fresh.running = "working", old.running
            return fetched
        return [StopWork(old.running), *fetched]

    def drop(self) -> Effects:
        """Let go of the task: it is not due any more."""
        return [*self.stop(), *self.fetching.want(())]

    def stop(self) -> Effects:
        """Let go of the task for now: its download stays where it is, for the next start."""
        work, self._work = self._work, None
        return [StopWork(work.running)] if work and work.stage == "working" else []

    def rekey(self, signing_key: bytes) -> None:
        """Sign with another key from now on, a result on its way too."""
        self._signing_key = signing_key
        if self._work is not None and self._work.offering is not None:
            self._work.offering.rekey(signing_key)

    def restart(self, now: float) -> None:
        """Go on with what was on its way on a connection that is gone."""
        self.last = b""
        self.fetching.restart(now)
        if self._work is not None and self._work.offering is not None:
            self._work.offering.restart(now)

    def ask_after_offer(self, now: float) -> None:
        """Offer at once: the result's fate is decided, and the word on it was lost."""
        if self._work is not None and self._work.offering is not None:
            self._work.offering.offer_now(now)

    def work_done(self, event: WorkDone, now: float) -> Effects:
        """Offer the result; one made out to an earlier attempt has to be made out anew."""
        work = self._work
        if work is None or work.stage != "working" or event.task not in (work.task, work.running):
            return []
        if event.task != work.task:
            work.running = work.task
            return [StartWork(work.task, work.manifest)]
        work.stage, work.offering = "offering", Offering(event.upload, self._signing_key, now)
        return []

    def work_failed(self, task: bytes, reason: str, now: float) -> None:
        """Report the failure until it is acknowledged."""
        work = self._work
        if work is not None and work.stage == "working" and task in (work.task, work.running):
            _fail(work, reason, now)

    def progress(self, event: WorkProgress) -> Effects:
        """Pass on how far the worker is."""
        work = self._work
        if work is None or work.stage != "working" or not (math.isfinite(event.loss) and math.isfinite(event.dice)):
            return []
        stage = event.stage[:64] or work.manifest.kind
        return [Say(Progress(work.task, stage, event.step, event.steps, float(event.loss), float(event.dice)))]

    def upload(self, message: Go | Credit | Wait | Commit, now: float) -> Effects:
        """Return what becomes due by the coordinator's word on the result."""
        work = self._work
        if work is None or work.offering is None or work.offering.id != message.upload:
            return []
        match message:
            case Go():
                return work.offering.go(message, now)
            case Credit():
                return work.offering.credit(message, now)
            case Wait():
                work.offering.wait(now)
                return []
            case Commit():
                self._work, self.last = None, work.task
                return [Committed(work.task, work.manifest)]

    def acknowledged(self, task: bytes) -> None:
        """Forget a task whose failure the coordinator has noted."""
        if self._work is not None and self._work.task == task and self._work.stage == "failing":
            self._work, self.last = None, task

    def refused(self, message: Refuse, now: float) -> Effects:
        """Return what becomes of the task when the coordinator refuses its result or its failure."""
        work = self._work
        if work is None or work.offering is None or work.offering.id != message.about:
            self.acknowledged(message.about)
            return []
        if message.code == "no_space":
            work.offering.put_off(now)
            return [Note("upload_refused", {"code": message.code, "reason": message.reason})]
        if message.code in OVER_CODES:
            self.last = work.task
            return self.drop()
        if message.code != "corrupt" or work.offering.is_damaged(now):
            _fail(work, f"the coordinator refused the result: {message.reason}", now)
        return []

    def start_work(self) -> Effects:
        """Start the worker as soon as all blobs are here."""
        work = self._work
        if work is None or work.stage != "fetching" or not self.fetching.is_complete:
            return []
        work.stage, work.running = "working", work.task
        return [StartWork(work.task, work.manifest)]

    def due(self, now: float) -> Effects:
        """Return what is to be said now about the task."""
        work, effects = self._work, self.fetching.due(now)
        if work is not None and work.offering is not None:
            effects += work.offering.due(now)
        if work is not None and work.stage == "failing" and now >= work.say_failed_at:
            work.say_failed_at = now + REPEAT_SECONDS
            effects.append(Say(Failed(work.task, work.reason)))
        return effects


def _fail(work: _Work, reason: str, now: float) -> None:
    work.stage, work.offering = "failing", None
    work.reason, work.say_failed_at = reason[:MOST_TEXT], now
