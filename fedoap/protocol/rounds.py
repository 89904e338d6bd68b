"""The course of a federation at the coordinator: what is open, when it closes, what comes after.

`advance` is asked on start and after every event, and does whatever is due by then, so no crash and no
order of events can leave a round that is complete without its end. What must outlast a crash is one
value, `history`, and grows only by the records that the daemon writes down.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace

from fedoap.chain import Outcome
from fedoap.config import FederationConfig
from fedoap.errors import RefusedError
from fedoap.identity import TASK_CONTEXT, Roster, sign
from fedoap.manifests import NO_KEY, BlobManifest, TaskManifest
from fedoap.messages import FromCoordinator, Idle, Progress, Task
from fedoap.protocol.attendance import Attendance, Gathering
from fedoap.protocol.course import Step, attempts, course, due, failures
from fedoap.protocol.events import (
    Aggregate,
    AggregateFailed,
    CoordinatorEffect,
    Note,
    RecordClosed,
    RecordOpened,
    Send,
    Update,
)
from fedoap.protocol.exchange import Exchange, Tally
from fedoap.protocol.history import History, OpenExchange, Revoked, after
from fedoap.protocol.uploads import Upload, Uploads
from fedoap.seal import KEY_BYTES, public_half

FIRST_MERGE_PAUSE_SECONDS = 10.0
"""Until a merge that failed is tried again; doubles each time, since a full disk needs an operator."""
ATTEMPT_PAUSES_SECONDS = (30.0, 120.0, 480.0, 1920.0)
"""Until a step that sites could not do is tried again: what ails them may pass, or needs their operator."""
KEY_REVOKED = "its key was revoked"
MOST_TEXT = 500
"""Characters of a reason that a message can carry."""

Effects = list[CoordinatorEffect]
Fields = dict[str, str | int | float]


class Rounds:
    """What is due in one federation, and what has been done."""

    def __init__(
        self,
        config: FederationConfig,
        roster: Roster,
        history: History,
        attendance: Attendance,
        *,
        signing_key: bytes,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self.config, self.plan, self.roster, self.history = config, config.plan, roster, history
        self.attendance = attendance
        self._use(roster)
        self.uploads = Uploads(config.coordinator.uploads_at_once)
        self.exchange: Exchange | None = None
        self.progress: dict[str, Progress] = {}
        self.now = 0.0
        self._course, self._signing_key, self._random_bytes = course(config.plan), signing_key, random_bytes
        self._gathering = Gathering(config.quorum, config.rounds.silence_seconds)
        self._silent: frozenset[str] = frozenset()
        self._has_ended = False
        self._open_at = -math.inf

    @property
    def step(self) -> Step | None:
        """What is under way or comes next; None where all is done."""
        return due(self._course, self.history.closed)

    @property
    def end(self) -> Idle | None:
        """The last word, once there is nothing more to do."""
        step, closed = self.step, self.history.closed
        if step is None:
            return Idle("finished", f"all {self.plan.rounds} rounds are done")
        failed = failures(closed)
        if self.exchange is None and len(failed) >= self.config.rounds.attempts:
            vain = f"{step} failed {len(failed)} times, last because {failed[-1].reason}"
            return Idle("stopped", f"{vain}; raise rounds.attempts and restart to go on"[:MOST_TEXT])
        return None

    @property
    def live(self) -> tuple[str, ...]:
        """The sites that were heard lately, in the configuration's order."""
        return tuple(site for site in self.config.sites if site in self.active and not self.is_silent(site))

    @property
    def pause(self) -> float:
        """Seconds until the step that failed is tried again."""
        return max(0.0, self._open_at - self.now)

    @property
    def published(self) -> tuple[BlobManifest, ...]:
        """What sites may fetch now."""
        return tuple(blob for blob in (self.history.model, self.history.bank) if blob is not None)

    def is_silent(self, site: str) -> bool:
        """Return whether a site was not heard for too long; one of the cohort has time since the opening."""
        exchange = self.exchange
        since = exchange.listened_from if exchange and site in exchange.cohort else -math.inf
        return self.attendance.is_silent(site, since, self.now, self.config.rounds.silence_seconds)

    def start(self, now: float) -> Effects:
        """Take up the exchange that was under way; its deadline and the sites' silence count from now."""
        self.now = now
        opened, effects = self.history.open, Effects()
        if opened is not None:
            self.exchange = Exchange(opened.manifest, opened.task, now, self._quorum(opened.manifest))
            self.uploads.begin(opened.secret)
            for arriving in opened.arriving:
                self.uploads.resume(arriving, now)
            for site in sorted(opened.revoked & self.exchange.cohort):
                effects += self._give_up(site, KEY_REVOKED)
        return [*effects, *self.change_roster(self.roster)]

    def change_roster(self, roster: Roster) -> Effects:
        """Go by this roster from now on: a site that is not on it any more sits the open exchange out."""
        self._use(roster)
        effects: Effects = []
        for site in self.exchange.manifest.cohort if self.exchange else ():
            if site not in self.active:
                self.history = after(self.history, Revoked(site))
                effects += self._give_up(site, KEY_REVOKED)
        return effects

    def advance(self, now: float) -> Effects:
        """Return all that has become due by now."""
        self.now = now
        effects: Effects = []
        while more := self._next():
            effects += more
        return effects

    def owed(self, site: str) -> OpenExchange | None:
        """Return the open exchange if the site still owes its result."""
        opened, exchange = self.history.open, self.exchange
        return opened if opened and exchange and exchange.awaits(site, opened) else None

    def require(self, task: bytes, site: str) -> OpenExchange:
        """Return the open exchange, if this is its task and the site takes part in it.

        Raises:
            RefusedError: the task is over, was never announced, or is not this site's.
        """
        opened = self.history.open
        if opened is not None and self.exchange is not None and opened.task == task:
            if site not in self.exchange.cohort:
                raise RefusedError("foreign", f"site {site} is not of this task's cohort")
            if site in opened.revoked:
                raise RefusedError("foreign", f"site {site} sits this task out: its key was revoked after it began")
            if self.exchange.merging is not None:
                raise RefusedError("late", f"{self.exchange.step} is closed")
            return opened
        over = next((one for one in self.history.closed if one.task == task), None)
        if over is None:
            raise RefusedError("unknown_task", "no task of this name was ever announced")
        raise RefusedError("late", f"{Step(over.kind, over.round)}, attempt {over.attempt}, is closed")

    def holds(self, upload: bytes) -> bool:
        """Return whether an upload is durable here and has counted, or will."""
        opened = self.history.open
        is_recorded = opened is not None and any(one.upload == upload for one in opened.updates)
        return is_recorded or any(upload in one.counted for one in self.history.closed)

    def fail(self, site: str, task: bytes, reason: str) -> Effects:
        """Note that a site cannot do its task; it is not waited for until the next.

        Raises:
            RefusedError: the task is not open, not this site's, or its result is recorded already.
        """
        opened = self.require(task, site)
        if any(update.site == site for update in opened.updates):
            raise RefusedError("duplicate", f"site {site} has committed its result already")
        return self._give_up(site, reason)

    def retry(self, site: str) -> None:
        """Wait for a site again that had said it could not do its task: it has a result now."""
        if self.exchange is not None:
            self.exchange.failed.pop(site, None)

    def stored(self, upload: bytes) -> Effects:
        """Count an upload that is durable."""
        one, exchange = self.uploads.named(upload), self.exchange
        if one is None or exchange is None:
            return []
        self.history = after(self.history, Update(one.site, one.id, one.manifest))
        return [_committed(one, exchange, self.now), *self.uploads.stored(one, self.now)]

    def aggregated(self, task: bytes, result: BlobManifest | None) -> Effects:
        """Close the exchange whose result is durable."""
        if self.exchange is None or self.exchange.merging is None or self.exchange.task != task:
            return []
        return self._close("done", result)

    def aggregate_failed(self, event: AggregateFailed) -> Effects:
        """Leave out the site that is to blame, or try again after a while; after some, give the attempt up."""
        exchange = self.exchange
        if exchange is None or exchange.merging is None or exchange.task != event.task:
            return []
        if event.site in exchange.cohort:
            exchange.merging = None
            return self._give_up(event.site, event.reason)
        exchange.merge_failures += 1
        exchange.merge_reason = event.reason
        if exchange.merge_failures >= self.config.rounds.attempts:
            return self._close("abandoned", None, f"merging failed: {event.reason}")
        exchange.merge_again_at = self.now + FIRST_MERGE_PAUSE_SECONDS * 2 ** (exchange.merge_failures - 1)
        return [Note("merge_failed", {"reason": event.reason, "failures": exchange.merge_failures})]

    def excuse(self, seconds: float) -> None:
        """Count it against no site that nobody was listened to for so long."""
        self.attendance.excuse(seconds)
        if self.exchange is not None:
            self.exchange.listened_from += seconds

    def note_silence(self) -> Effects:
        """Return a note for each site that has fallen silent since this was asked last."""
        heard = {site for site in self.config.sites if self.attendance.heard(site) > -math.inf}
        silent = frozenset(site for site in heard if self.is_silent(site))
        fresh, self._silent = sorted(silent - self._silent), silent
        return [Note("site_silent", {"site": site}) for site in fresh]

    def _use(self, roster: Roster) -> None:
        self.roster = roster
        self.active = frozenset(member.name for member in roster.members if not member.revoked)
        self.revoked = frozenset(member.name for member in roster.members if member.revoked)

    def _next(self) -> Effects:
        exchange, opened = self.exchange, self.history.open
        if exchange is None or opened is None:
            return self._say_end() if self.end else self._open_next()
        if exchange.merging is not None:
            return self._merge_again(exchange)
        tally = exchange.tally(opened, self.is_silent, self.now)
        match tally.outcome():
            case "open":
                return []
            case "done":
                exchange.merging = exchange.counted(opened)
                return [*self.uploads.clear(), *self._merge(exchange)]
            case "abandoned" | "unattended" as outcome:
                return self._close(outcome, None, self._why(exchange, tally))

    def _open_next(self) -> Effects:
        expected = [site for site in self.config.sites if site not in self.revoked]
        if not self._gathering.is_over(len(self.live), len(expected), self.now) or self.pause > 0:
            return []
        secret = self._random_bytes(KEY_BYTES)
        manifest = replace(self._manifest(), seal_key=public_half(secret))
        packed = manifest.pack()
        task, signature = hashlib.sha256(packed).digest(), sign(self._signing_key, TASK_CONTEXT, packed)
        record = RecordOpened(task, manifest, packed, signature, secret)
        self.uploads.begin(secret)
        self.history = after(self.history, record)
        self.exchange = Exchange(manifest, task, self.now, self._quorum(manifest))
        self.progress.clear()
        fields: Fields = {"kind": manifest.kind, "round": manifest.round, "attempt": manifest.attempt}
        return [record, Note("task_opened", fields), *self._tell(manifest.cohort, Task(task, signature), packed)]

    def _manifest(self) -> TaskManifest:
        step, live, vain = self.step, self.live, len(attempts(self.history.closed))
        assert step is not None
        cohort = (live[vain % len(live)],) if step.kind == "init" else live
        model, bank = (None, None) if step.kind == "init" else (self.history.model, self.history.bank)
        deadline = math.ceil(self.config.rounds.deadline_minutes * 60)
        name, plan = self.plan.federation, self.plan.digest
        return TaskManifest(name, plan, step.kind, step.round, vain + 1, cohort, deadline, model, bank)

    def _merge(self, exchange: Exchange) -> Effects:
        assert exchange.merging is not None
        exchange.merge_again_at = None
        if exchange.step.kind == "calibrate":  # metrics only
            return self._close("done", None)
        assert self.history.open is not None
        return [Aggregate(exchange.task, exchange.manifest, exchange.merging, self.history.open.secret)]

    def _merge_again(self, exchange: Exchange) -> Effects:
        is_due = exchange.merge_again_at is not None and self.now >= exchange.merge_again_at
        return self._merge(exchange) if is_due else []

    def _close(self, outcome: Outcome, result: BlobManifest | None, reason: str = "") -> Effects:
        exchange = self.exchange
        assert exchange is not None
        counted = tuple(update.upload for update in exchange.merging or ()) if outcome == "done" else ()
        record = RecordClosed(exchange.task, outcome, counted, result, reason)
        self.history = after(self.history, record)
        self.exchange = None
        self.uploads.begin(NO_KEY)
        if outcome == "abandoned" and exchange.failed:
            self._open_at = self.now + self._pause_before_next()
        return [*self.uploads.clear(), record, _closed(exchange, record, self.now)]

    def _say_end(self) -> Effects:
        end = self.end
        if self._has_ended or end is None:
            return []
        self._has_ended = True
        note = Note("finished") if end.state == "finished" else Note("stopped", {"reason": end.reason})
        return [note, *self._tell(self.config.sites, end)]

    def _tell(self, sites: tuple[str, ...], message: FromCoordinator, body: bytes = b"") -> Effects:
        routes = [self.attendance.route(site) for site in sites]
        return [Send(route, message, body) for route in routes if route is not None]

    def _give_up(self, site: str, reason: str) -> Effects:
        if self.exchange is None or site in self.exchange.failed:
            return []
        self.exchange.failed[site] = reason
        return [Note("site_failed", {"site": site, "reason": reason}), *self.uploads.end(site, self.now)]

    def _pause_before_next(self) -> float:
        vain, step = len(failures(self.history.closed)), self.step
        if step is not None and step.kind == "init":  # a site at a time: the next one may well be able to
            vain -= len(self.config.sites) - 1
        return ATTEMPT_PAUSES_SECONDS[min(vain, len(ATTEMPT_PAUSES_SECONDS)) - 1] if vain > 0 else 0.0

    def _quorum(self, manifest: TaskManifest) -> int:
        return 1 if manifest.kind == "init" else self.config.quorum

    def _why(self, exchange: Exchange, tally: Tally) -> str:
        """Return why an exchange cannot be done, for the operator who reads it the next morning."""
        counted = f"{len(tally.committed)} of {len(tally.cohort)} sites committed, but {tally.quorum} are needed"
        failed = [f"{site} failed: {reason}" for site, reason in sorted(exchange.failed.items())]
        words = {True: "fell silent", False: "was still at work"}
        missing = [f"{site} {words[self.is_silent(site)]}" for site in tally.missing]
        return "; ".join([counted, *failed, *missing])[:MOST_TEXT]


def _committed(one: Upload, exchange: Exchange, now: float) -> Note:
    step = exchange.step
    metrics: Fields = {f"metric.{name}": value for name, value in one.manifest.metrics}
    fields: Fields = {"site": one.site, "kind": step.kind, "round": step.round, "bytes": one.manifest.blob.size}
    return Note("site_committed", {**fields, "seconds": now - exchange.opened_at, **metrics})


def _closed(exchange: Exchange, record: RecordClosed, now: float) -> Note:
    step = exchange.step
    fields: Fields = {
        "kind": step.kind,
        "round": step.round,
        "attempt": exchange.manifest.attempt,
        "outcome": record.outcome,
    }
    return Note(
        "task_closed",
        {**fields, "counted": len(record.counted), "seconds": now - exchange.opened_at, "reason": record.reason},
    )
