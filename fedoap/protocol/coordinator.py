"""The coordinator's machine: what each message of a site is answered with.

`handle(event, now)` looks at one event, then asks the round machine (`protocol.rounds`) what has become
due. Whoever speaks is checked against the live roster first, on every message; a message that makes no
sense raises `RefusedError` inside, changes nothing, and is answered by `Refuse` with its code.
"""

import math
from collections.abc import Callable
from typing import cast

from fedoap.config import FederationConfig
from fedoap.errors import RefusedError
from fedoap.identity import Member, Roster
from fedoap.messages import (
    Ack,
    Bye,
    Chunk,
    Commit,
    Enrol,
    Failed,
    FromSite,
    Get,
    Hello,
    Offer,
    Open,
    Proceed,
    Progress,
    RefusalCode,
    Refuse,
    Sync,
    Task,
    Wait,
    Welcome,
)
from fedoap.pace import MOST_CHUNKS
from fedoap.protocol import view
from fedoap.protocol.attendance import Attendance
from fedoap.protocol.checks import check_result, read_offer
from fedoap.protocol.events import (
    Aggregated,
    AggregateFailed,
    CoordinatorEffect,
    CoordinatorEvent,
    Malformed,
    Note,
    Received,
    RosterChanged,
    Send,
    SendBlob,
    Stopping,
    Stored,
    StoreFailed,
    Tick,
)
from fedoap.protocol.history import History
from fedoap.protocol.rounds import MOST_TEXT, Rounds
from fedoap.protocol.status import Status

NOTE_SECONDS = 10.0
"""A site's refusals with one code are noted at most this often: a peer out of order must not fill the log."""

STOPPING = "the coordinator is being stopped; it will be back"

Effects = list[CoordinatorEffect]


class Coordinator:
    """One federation, from the first hello to the last commit; `clock` gives Unix seconds, for sites to compare."""

    def __init__(
        self,
        config: FederationConfig,
        roster: Roster,
        history: History,
        *,
        signing_key: bytes,
        random_bytes: Callable[[int], bytes],
        software: str,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._config, self._plan = config, config.plan
        self._attendance = Attendance(config.federation, software, random_bytes, clock)
        self._rounds = Rounds(
            config, roster, history, self._attendance, signing_key=signing_key, random_bytes=random_bytes
        )
        self._noted: dict[tuple[str, str], float] = {}
        self._is_stopping = False

    def start(self, now: float) -> Effects:
        """Return what is due right after a start: an open exchange may have become complete before a crash."""
        return [*self._rounds.start(now), *self._rounds.advance(now)]

    def handle(self, event: CoordinatorEvent, now: float) -> Effects:
        """Return what the daemon has to do, in order, because of one event."""
        self._rounds.now = now
        effects = self._handle(event, now)
        if self._is_stopping or _changes_nothing(event):
            return effects
        return [*effects, *self._rounds.advance(now)]

    def excuse(self, seconds: float) -> None:
        """Count it against no site that the daemon listened to nobody for so long."""
        self._rounds.excuse(seconds)

    def status(self) -> Status:
        """Return how the federation stands, as of the last event."""
        return view.status(self._rounds)

    def _handle(self, event: CoordinatorEvent, now: float) -> Effects:
        match event:
            case Received():
                return self._received(event, now)
            case Malformed(site, route, reason):
                return self._malformed(site, route, reason, now)
            case Stored(upload):
                return self._rounds.stored(upload)
            case StoreFailed():
                return self._store_failed(event, now)
            case Aggregated(task, result):
                return self._rounds.aggregated(task, result)
            case AggregateFailed():
                return self._rounds.aggregate_failed(event)
            case RosterChanged(roster):
                return self._change_roster(roster, now)
            case Stopping():
                return self._stop()
            case Tick():
                return [*self._rounds.note_silence(), *self._rounds.uploads.make_room(now)]

    def _received(self, event: Received, now: float) -> Effects:
        try:
            return self._answer(self._member(event.site), event, now)
        except RefusedError as error:
            return self._refuse(event, error, _about(event.message), now)

    def _malformed(self, site: str, route: bytes, reason: str, now: float) -> Effects:
        event = Malformed(site, route, reason)
        try:
            self._member(site)
        except RefusedError as error:
            return self._refuse(event, error, b"", now)
        return self._refuse(event, RefusedError("malformed", reason), b"", now)

    def _member(self, site: str) -> Member:
        member = self._rounds.roster.find(site)
        if member is None or site not in self._config.sites:
            raise RefusedError("unknown_site", f"{site} is not an enrolled site of {self._config.federation}")
        if member.revoked:
            raise RefusedError("revoked", f"the key of site {site} was revoked")
        if self._is_stopping:
            raise RefusedError("stopping", STOPPING)
        return member

    def _answer(self, member: Member, event: Received, now: float) -> Effects:
        site, route, message = event.site, event.route, event.message
        match message:
            case Open():
                return [Send(route, self._attendance.open(site, route, message))]
            case Hello():
                return self._hello(member, route, message, now)
            case Enrol():
                raise RefusedError("exists", f"site {site} is enrolled already")
            case _:
                self._attendance.require(site, route)
                self._attendance.hear(site, now)
                return self._answer_joined(member, event, now)

    def _answer_joined(self, member: Member, event: Received, now: float) -> Effects:
        site, route, message = event.site, event.route, event.message
        match message:
            case Sync(task):
                return [self._due(site, route, task)]
            case Progress():
                return self._progress(site, message)
            case Get():
                return [self._blob(route, message)]
            case Offer():
                return self._offer(member, route, message, bytes(event.body), now)
            case Chunk():
                return self._chunk(site, route, message, memoryview(event.body), now)
            case Failed(task, reason):
                return [*self._rounds.fail(site, task, reason), Send(route, Ack(task))]
            case Bye():
                self._attendance.leave(site)
                return self._rounds.uploads.end(site, now)
            case _:
                raise RefusedError("malformed", f"{message.type} makes no sense here")

    def _hello(self, member: Member, route: bytes, message: Hello, now: float) -> Effects:
        site, is_new = member.name, self._attendance.route(member.name) != route
        before = self._attendance.hello(member, route, message, now)
        welcome: Effects = [Send(route, Welcome(site, self._plan.digest), self._plan.to_bytes())]
        if is_new:
            welcome.append(Note("site_joined", {"site": site, "software": self._attendance.software(site)}))
        if before is not None:
            welcome.append(Send(before, Refuse("superseded", f"site {site} has connected anew")))
        return welcome

    def _due(self, site: str, route: bytes, task: bytes) -> Send:
        opened = self._rounds.owed(site)
        if opened is None:
            return Send(route, view.idle(self._rounds))
        if opened.task == task:
            return Send(route, Proceed(task))
        return Send(route, Task(opened.task, opened.signature), opened.packed)

    def _progress(self, site: str, message: Progress) -> Effects:
        opened = self._rounds.owed(site)
        if opened is None or opened.task != message.task:
            return []
        self._rounds.progress[site] = message
        said: dict[str, str | int | float] = {"site": site, "kind": opened.manifest.kind}
        said |= {"round": opened.manifest.round, "stage": message.stage, "step": message.step}
        return [Note("site_progress", said | {"steps": message.steps, "loss": message.loss, "dice": message.dice})]

    def _blob(self, route: bytes, message: Get) -> SendBlob:
        blob = next((one for one in self._rounds.published if one.id == message.blob), None)
        if blob is None:
            raise RefusedError("no_blob", "no blob of this name is published now")
        upto = min(message.upto, blob.size, message.at + MOST_CHUNKS * blob.chunk_bytes)
        if message.at % blob.chunk_bytes or message.at >= upto:
            raise RefusedError("malformed", f"get asks for bytes {message.at} to {message.upto} of {blob.size}")
        return SendBlob(route, blob.id, message.at, upto)

    def _offer(self, member: Member, route: bytes, message: Offer, body: bytes, now: float) -> Effects:
        upload, rounds = read_offer(member, message, body), self._rounds
        if rounds.holds(message.upload):
            return [Send(route, Commit(message.upload))]
        opened = rounds.require(upload.task, member.name)
        if any(update.site == member.name for update in opened.updates):
            raise RefusedError("duplicate", f"another result of site {member.name} is recorded for this task")
        check_result(upload, opened.manifest, self._plan, rounds.history.schema)
        effects = rounds.uploads.offer(upload, message.upload, message.signature, route, now)
        rounds.retry(member.name)
        return effects

    def _chunk(self, site: str, route: bytes, message: Chunk, body: memoryview, now: float) -> Effects:
        uploads, upload = self._rounds.uploads, self._rounds.uploads.find(site)
        if upload is None or upload.id != message.upload or upload.route != route:
            return [self._stray(site, route, message)]
        try:
            return uploads.chunk(site, message, body, now)
        except RefusedError as error:
            over = uploads.end(site, now) if error.code == "not_finite" else []
            return [*over, *self._refuse(Received(site, route, message), error, message.upload, now)]

    def _stray(self, site: str, route: bytes, message: Chunk) -> Send:
        """Return the answer to a chunk that belongs to no upload under way."""
        if self._rounds.holds(message.upload):
            return Send(route, Commit(message.upload))
        if self._rounds.owed(site) is None:
            raise RefusedError("late", "no result of this site is awaited")
        return Send(route, Wait(message.upload))

    def _store_failed(self, event: StoreFailed, now: float) -> Effects:
        one = self._rounds.uploads.named(event.upload)
        if one is None:
            return []
        refuse = Send(one.route, Refuse(event.code, event.reason[:MOST_TEXT], event.upload))
        note = Note("refused", {"site": one.site, "code": event.code, "reason": event.reason})
        return [refuse, note, *self._rounds.uploads.end(one.site, now, drop=False)]

    def _change_roster(self, roster: Roster, now: float) -> Effects:
        before, effects = self._rounds.roster, list[CoordinatorEffect]()
        for site in self._config.sites:
            if before.find(site) != roster.find(site):
                effects += self._rounds.uploads.end(site, now)
                route = self._attendance.route(site)
                self._attendance.leave(site)
                if route is not None and roster.active(site) is None:
                    effects.append(Send(route, Refuse("revoked", f"the key of site {site} was revoked")))
        return [*effects, *self._rounds.change_roster(roster)]

    def _stop(self) -> Effects:
        self._is_stopping = True
        routes = [self._attendance.route(site) for site in self._config.sites]
        farewell = [Send(route, Refuse("stopping", STOPPING)) for route in routes if route is not None]
        return [*self._rounds.uploads.keep(), *farewell]

    def _refuse(self, event: Received | Malformed, error: RefusedError, about: bytes, now: float) -> Effects:
        code, reason = cast(RefusalCode, error.code), str(error)[:MOST_TEXT]
        refuse = Send(event.route, Refuse(code, reason, about))
        if now - self._noted.get((event.site, code), -math.inf) < NOTE_SECONDS:
            return [refuse]
        self._noted[event.site, code] = now
        return [refuse, Note("refused", {"site": event.site, "code": code, "reason": reason})]


def _changes_nothing(event: CoordinatorEvent) -> bool:
    """Return whether an event can make nothing due: these come in thousands, and the next tick is near."""
    return isinstance(event, Received) and isinstance(event.message, Chunk | Get | Progress | Sync)


def _about(message: FromSite) -> bytes:
    """Return the hash that a message is about, or nothing."""
    match message:
        case Offer() | Chunk():
            return message.upload
        case Failed() | Progress():
            return message.task
        case Get():
            return message.blob
        case _:
            return b""
