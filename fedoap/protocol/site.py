"""The site's machine: it says hello, asks what is due, has it done, and offers the result until it is kept.

`handle(event, now)` looks at one event, then at everything that has become due, so nothing depends on
any one message: what was lost is said again, what was repeated changes nothing. A broken connection
stops neither the worker nor a transfer; both go on where they were once the site is let in again.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from fedoap.config import Plan
from fedoap.errors import FedoapError, RefusedError
from fedoap.messages import (
    Ack,
    Bye,
    Challenge,
    Commit,
    Credit,
    Data,
    Enrolled,
    Go,
    Idle,
    Proceed,
    RefusalCode,
    Refuse,
    Sync,
    Task,
    Wait,
    Welcome,
)
from fedoap.protocol.assignment import place, read_plan, read_task
from fedoap.protocol.events import (
    Answered,
    BlobFailed,
    BlobStored,
    Connected,
    Disconnected,
    Learned,
    Leave,
    Note,
    Rekeyed,
    Say,
    SiteEffect,
    SiteEvent,
    Stopping,
    Tick,
    WorkDone,
    WorkFailed,
    WorkProgress,
)
from fedoap.protocol.greeting import Greeting
from fedoap.protocol.hand import Hand

SYNC_SECONDS = 5.0
"""How often a site asks what is due; that is also its sign of life."""
SLOW_SYNC_SECONDS = 30.0
"""The same once the federation has finished or stopped."""
LEAVE_CODES: frozenset[RefusalCode] = frozenset({"version", "plan", "unknown_site", "revoked", "superseded", "exists"})
"""Refusals that waiting will not mend."""

Effects = list[SiteEffect]


class Site:
    """One site's part in one federation, as long as its daemon runs.

    `have` names the blobs that are here; `partly` says of others how many of their first bytes are.
    """

    def __init__(
        self,
        federation: str,
        site: str,
        federation_key: bytes,
        signing_key: bytes,
        curve_key: bytes,
        *,
        have: frozenset[bytes] = frozenset(),
        partly: Mapping[bytes, int] = MappingProxyType({}),
        software: str,
    ) -> None:
        self._federation, self._site, self._federation_key = federation, site, federation_key
        self._greeting = Greeting(federation, site, signing_key, curve_key, software)
        self._hand = Hand(signing_key, have, partly)
        self._plan: Plan | None = None
        self._newest = (-1, 0)
        self._sync_at, self._sync_seconds = 0.0, SYNC_SECONDS
        self._end = ""

    def handle(self, event: SiteEvent, now: float) -> Effects:
        """Return what the daemon has to do, in order, because of one event."""
        before = self._hand.task
        effects = self._handle(event, now)
        if before and not self._hand.task:
            self._sync_at = now  # its hands are free: ask at once
        return [*effects, *self._hand.start_work(), *self._due(now)]

    def _handle(self, event: SiteEvent, now: float) -> Effects:
        match event:
            case Connected():
                return self._greeting.connect(now)
            case Disconnected():
                self._greeting.disconnect()
            case Rekeyed(signing_key, curve_key):
                self._greeting.rekey(signing_key, curve_key)
                self._hand.rekey(signing_key)
            case Answered():
                return self._answered(event, now)
            case BlobStored(blob):
                self._hand.fetching.stored(blob)
                self._sync_at = now  # a word by which the coordinator knows that the line is free
            case BlobFailed(blob, reason):
                return self._hand.fetching.failed(blob, reason, now)
            case WorkDone():
                return self._hand.work_done(event, now)
            case WorkFailed(task, reason):
                self._hand.work_failed(task, reason, now)
            case WorkProgress():
                return self._hand.progress(event) if self._greeting.is_joined else []
            case Stopping():
                return self._stop()
            case Tick():
                pass
        return []

    def _answered(self, event: Answered, now: float) -> Effects:
        message, body = event.message, event.body
        match message:
            case Challenge():
                return self._challenge(message, now)
            case Welcome():
                return self._welcome(message, bytes(body), now)
            case Refuse():
                return self._refused(message, now)
            case _ if not self._greeting.is_joined:
                return []  # left over from before the handshake: what matters is said again after it
            case Task():
                return self._task(message, bytes(body), now)
            case Idle():
                return self._idle(message, now)
            case Data():
                return self._hand.fetching.data(message, memoryview(body), now)
            case Go() | Credit() | Wait() | Commit():
                return self._hand.upload(message, now)
            case Ack(task):
                self._hand.acknowledged(task)
            case Proceed() | Enrolled():
                pass
        return []

    def _challenge(self, message: Challenge, now: float) -> Effects:
        try:
            return self._greeting.challenge(message, now)
        except RefusedError as error:
            return self._leave("version", str(error))

    def _welcome(self, message: Welcome, body: bytes, now: float) -> Effects:
        if self._greeting.state != "answering":
            return []
        try:
            plan = read_plan(message, body, self._federation)
        except FedoapError as error:
            return self._leave("plan", str(error))
        learned: Effects = [] if plan == self._plan else [Learned(body)]
        self._plan, self._newest, self._sync_at = plan, (-1, 0), now
        self._greeting.join()
        self._hand.restart(now)
        return learned

    def _task(self, message: Task, body: bytes, now: float) -> Effects:
        if message.task in (self._hand.task, self._hand.last):
            return []
        assert self._plan is not None  # it came with the welcome
        try:
            manifest = read_task(message, body, self._federation_key, self._plan, self._site)
        except FedoapError as error:
            return [Note("task_refused", {"reason": str(error)})]
        if place(manifest, self._plan) < self._newest:
            return []
        self._newest = place(manifest, self._plan)
        self._end, self._sync_seconds, self._sync_at = "", SYNC_SECONDS, now + SYNC_SECONDS
        return self._hand.take(message.task, manifest)

    def _idle(self, message: Idle, now: float) -> Effects:
        if self._hand.is_offering:
            self._hand.ask_after_offer(now)
            return []
        dropped = self._hand.drop()
        if message.state == "waiting":
            self._sync_seconds = SYNC_SECONDS
            return dropped
        self._sync_seconds = SLOW_SYNC_SECONDS
        return [*dropped, *self._say_end(message.state, message.reason)]

    def _say_end(self, state: Literal["finished", "stopped"], reason: str) -> Effects:
        if self._end == state:
            return []
        self._end = state
        return [Leave(state, reason)]

    def _refused(self, message: Refuse, now: float) -> Effects:
        code = message.code
        if code in LEAVE_CODES or (code == "bad_signature" and not message.about):
            return self._leave(code, message.reason)
        if code in ("not_joined", "stopping"):
            self._greeting.rejoin(now)
        if code == "no_blob":
            self._sync_at = min(self._sync_at, now)  # the task that it was for is over
        return self._hand.refused(message, now)

    def _leave(self, code: RefusalCode, reason: str) -> Effects:
        """Say no more on this connection."""
        self._greeting.disconnect()
        return [Leave(code, reason)]

    def _stop(self) -> Effects:
        bye: Effects = [Say(Bye())] if self._greeting.is_joined else []
        self._greeting.disconnect()
        return [*self._hand.stop(), *bye]

    def _due(self, now: float) -> Effects:
        if not self._greeting.is_joined:
            return self._greeting.due(now)
        effects = self._hand.due(now)
        if now >= self._sync_at:
            self._sync_at = now + self._sync_seconds
            effects.append(Say(Sync(self._hand.task)))
        return effects
