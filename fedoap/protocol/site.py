"""The site's machine: it says hello, asks what is due, has it done, and offers the result until it is kept.

`handle(event, now)` looks at one event, then at everything that has become due, so nothing depends on
any one message: what was lost is said again, what was repeated changes nothing. A broken connection
stops neither the worker nor a transfer; both go on where they were once the site is let in again.
"""

import math
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
    Failed,
    Go,
    Idle,
    Proceed,
    Progress,
    RefusalCode,
    Refuse,
    Sync,
    Task,
    Wait,
    Welcome,
)
from fedoap.protocol.assignment import Assignment, place, read_plan, read_task
from fedoap.protocol.events import (
    Answered,
    BlobFailed,
    BlobStored,
    Committed,
    Connected,
    Disconnected,
    Learned,
    Leave,
    Note,
    Say,
    SiteEffect,
    SiteEvent,
    StartWork,
    Stopping,
    StopWork,
    Tick,
    WorkDone,
    WorkFailed,
    WorkProgress,
)
from fedoap.protocol.fetching import Fetching
from fedoap.protocol.greeting import Greeting
from fedoap.protocol.offering import Offering

SYNC_SECONDS = 5.0
"""How often a site asks what is due; that is also its sign of life."""
SLOW_SYNC_SECONDS = 30.0
"""The same once the federation has finished or stopped."""
MOST_TEXT = 500
LEAVE_CODES: frozenset[RefusalCode] = frozenset({"version", "plan", "unknown_site", "revoked", "superseded", "exists"})
"""Refusals that waiting will not mend."""
OVER_CODES: frozenset[RefusalCode] = frozenset({"late", "unknown_task", "foreign", "duplicate"})
"""Refusals of a result that is not wanted any more; any other says that the result itself is wrong."""

Effects = list[SiteEffect]


class Site:
    """One site's part in one federation, as long as its daemon runs."""

    def __init__(
        self,
        federation: str,
        site: str,
        federation_key: bytes,
        signing_key: bytes,
        curve_key: bytes,
        *,
        have: frozenset[bytes] = frozenset(),
        software: str,
    ) -> None:
        self._federation, self._site = federation, site
        self._federation_key, self._signing_key = federation_key, signing_key
        self._greeting = Greeting(federation, site, signing_key, curve_key, software)
        self._fetching = Fetching(have)
        self._plan: Plan | None = None
        self._hand: Assignment | None = None
        self._last = b""
        """The task that was done last, which nobody needs again on this connection."""
        self._newest = (-1, 0)
        self._sync_at, self._sync_seconds = 0.0, SYNC_SECONDS
        self._left = ""

    def handle(self, event: SiteEvent, now: float) -> Effects:
        """Return what the daemon has to do, in order, because of one event."""
        effects = self._handle(event, now)
        return [*effects, *self._due(now)]

    def _handle(self, event: SiteEvent, now: float) -> Effects:
        match event:
            case Connected():
                self._left = ""
                return self._greeting.connect(now)
            case Disconnected():
                self._greeting.disconnect()
            case Answered():
                return self._answered(event, now)
            case BlobStored(blob):
                self._fetching.stored(blob)
            case BlobFailed(blob, reason):
                return self._fetching.failed(blob, reason, now)
            case WorkDone():
                return self._work_done(event, now)
            case WorkFailed(task, reason):
                self._work_failed(task, reason, now)
            case WorkProgress():
                return self._progress(event)
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
                return self._fetching.data(message, memoryview(body), now)
            case Go() | Credit() | Wait() | Commit():
                return self._upload(message, now)
            case Ack(task):
                return self._over(task, now)
            case Proceed() | Enrolled():
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
        is_new = plan != self._plan
        self._plan, self._last, self._newest = plan, b"", (-1, 0)
        self._greeting.join()
        self._fetching.restart(now)
        if self._hand is not None and self._hand.offering is not None:
            self._hand.offering.restart(now)
        self._sync_at = now
        return [Learned(body)] if is_new else []

    def _task(self, message: Task, body: bytes, now: float) -> Effects:
        in_hand = self._hand.task if self._hand else b""
        if message.task in (in_hand, self._last):
            return []
        assert self._plan is not None  # learned with the welcome
        try:
            manifest = read_task(message, body, self._federation_key, self._plan, self._site)
        except FedoapError as error:
            return [Note("task_refused", {"reason": str(error)})]
        if place(manifest, self._plan) < self._newest:
            return []
        self._newest = place(manifest, self._plan)
        self._left, self._sync_seconds, self._sync_at = "", SYNC_SECONDS, now + SYNC_SECONDS
        return self._replace(Assignment(message.task, manifest))

    def _replace(self, fresh: Assignment) -> Effects:
        """Take up another task; work under way for an earlier attempt at the same goes on."""
        old, self._hand = self._hand, fresh
        wanted = self._fetching.want(fresh.manifest.blobs)
        if old is None or old.stage != "working":
            return wanted
        if old.manifest.work == fresh.manifest.work:
            fresh.stage, fresh.running = "working", old.running
            return wanted
        return [StopWork(old.running), *wanted]

    def _drop(self) -> Effects:
        """Let go of the task in hand: it is not due any more."""
        hand, self._hand = self._hand, None
        stopped: Effects = [StopWork(hand.running)] if hand and hand.stage == "working" else []
        return [*stopped, *self._fetching.want(())]

    def _idle(self, message: Idle, now: float) -> Effects:
        hand = self._hand
        if hand is not None and hand.offering is not None:
            hand.offering.offer_now(now)  # its fate was decided, and the word on it lost: ask
            return []
        dropped = self._drop()
        if message.state == "waiting":
            self._sync_seconds = SYNC_SECONDS
            return dropped
        self._sync_seconds = SLOW_SYNC_SECONDS
        return [*dropped, *self._say_leave(message.state, message.reason)]

    def _work_done(self, event: WorkDone, now: float) -> Effects:
        hand = self._hand
        if hand is None or hand.stage != "working" or event.task not in (hand.task, hand.running):
            return []
        if event.task != hand.task:  # made out to an earlier attempt: the daemon makes it out anew
            hand.running = hand.task
            return [StartWork(hand.task, hand.manifest)]
        hand.stage, hand.offering = "offering", Offering(event.upload, self._signing_key, now)
        return []

    def _work_failed(self, task: bytes, reason: str, now: float) -> None:
        hand = self._hand
        if hand is not None and hand.stage == "working" and task in (hand.task, hand.running):
            _fail(hand, reason, now)

    def _progress(self, event: WorkProgress) -> Effects:
        hand = self._hand
        if hand is None or hand.stage != "working" or not self._greeting.is_joined:
            return []
        if not (math.isfinite(event.loss) and math.isfinite(event.dice)):
            return []  # the worker itself ends on this, and says why
        stage = event.stage[:64] or hand.manifest.kind
        return [Say(Progress(hand.task, stage, event.step, event.steps, event.loss, event.dice))]

    def _upload(self, message: Go | Credit | Wait | Commit, now: float) -> Effects:
        hand = self._hand
        if hand is None or hand.offering is None or hand.offering.id != message.upload:
            return []
        match message:
            case Go():
                return hand.offering.go(message, now)
            case Credit():
                return hand.offering.credit(message, now)
            case Wait():
                hand.offering.wait(now)
                return []
            case Commit():
                return self._committed(hand, now)

    def _committed(self, hand: Assignment, now: float) -> Effects:
        self._hand, self._last, self._sync_at = None, hand.task, now
        self._fetching.keep(hand.manifest.blobs)
        return [Committed(hand.task, hand.manifest)]

    def _over(self, task: bytes, now: float) -> Effects:
        """Forget a task whose failure the coordinator has noted."""
        if self._hand is not None and self._hand.task == task and self._hand.stage == "failing":
            self._hand, self._last, self._sync_at = None, task, now
        return []

    def _refused(self, message: Refuse, now: float) -> Effects:
        code, hand = message.code, self._hand
        if code in LEAVE_CODES or (code == "bad_signature" and not message.about):
            return self._leave(code, message.reason)
        if code in ("not_joined", "stopping"):
            self._greeting.rejoin(now)
        elif hand is not None and hand.offering is not None and hand.offering.id == message.about:
            return self._result_refused(hand, hand.offering, message, now)
        elif hand is not None and hand.task == message.about:
            return self._over(message.about, now)
        elif code == "no_blob":
            self._sync_at = min(self._sync_at, now)  # the task that it was for is over
        return []

    def _result_refused(self, hand: Assignment, offering: Offering, message: Refuse, now: float) -> Effects:
        if message.code == "no_space":
            offering.put_off(now)
        elif message.code in OVER_CODES:
            self._last, self._sync_at = hand.task, now
            hand.offering = None
            return self._drop()
        elif message.code != "corrupt" or offering.is_damaged(now):
            hand.offering = None
            _fail(hand, f"the coordinator refused the result: {message.reason}", now)
        return []

    def _stop(self) -> Effects:
        stopped: Effects = [StopWork(self._hand.running)] if self._hand and self._hand.stage == "working" else []
        bye: Effects = [Say(Bye())] if self._greeting.is_joined else []
        self._greeting.disconnect()
        return [*stopped, *bye]

    def _leave(self, code: RefusalCode, reason: str) -> Effects:
        self._greeting.disconnect()
        return [Leave(code, reason)]

    def _say_leave(self, state: Literal["finished", "stopped"], reason: str) -> Effects:
        if self._left == state:
            return []
        self._left = state
        return [Leave(state, reason)]

    def _due(self, now: float) -> Effects:
        return [*self._start_work(), *(self._ask(now) if self._greeting.is_joined else self._greeting.due(now))]

    def _start_work(self) -> Effects:
        hand = self._hand
        if hand is None or hand.stage != "fetching" or not self._fetching.is_complete:
            return []
        hand.stage, hand.running = "working", hand.task
        return [StartWork(hand.task, hand.manifest)]

    def _ask(self, now: float) -> Effects:
        hand = self._hand
        effects = self._fetching.due(now)
        if hand is not None and hand.offering is not None:
            effects += hand.offering.due(now)
        if hand is not None and hand.stage == "failing" and now >= hand.say_failed_at:
            hand.say_failed_at = now + SYNC_SECONDS
            effects.append(Say(Failed(hand.task, hand.reason)))
        if now >= self._sync_at:
            self._sync_at = now + self._sync_seconds
            effects.append(Say(Sync(hand.task if hand else b"")))
        return effects


def _fail(hand: Assignment, reason: str, now: float) -> None:
    hand.stage, hand.reason, hand.say_failed_at = "failing", reason[:MOST_TEXT], now
