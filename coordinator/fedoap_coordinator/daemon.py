"""The coordinator's daemon: one thread that waits, decodes, lets the machine decide, and carries out its effects."""

import json
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import zmq

from fedoap.errors import FedoapError, MessageError
from fedoap.identity import fingerprint
from fedoap.messages import Enrol, FromCoordinator, Refuse, Rotate
from fedoap.protocol.coordinator import Coordinator
from fedoap.protocol.events import (
    Aggregate,
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
from fedoap_coordinator.console import Console, View
from fedoap_coordinator.descriptors import Doorkeeper
from fedoap_coordinator.downloads import Downloads
from fedoap_coordinator.enrolment import Answer, Enrolment
from fedoap_coordinator.journal import Journal
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.merging import Merging
from fedoap_coordinator.metrics import Counts, Figures, MetricsServer
from fedoap_coordinator.port import Arrived, Port
from fedoap_coordinator.reports import STATUS
from fedoap_coordinator.store import Store
from fedoap_coordinator.zap import Doors, Invitee, Site, Zap

TICK_SECONDS = 0.25
STATUS_SECONDS = 2.0
"""How often `status.json` is written: the loop waits where the file system flushes a file that replaces another."""
HELD_UP_SECONDS = 2.0
"""The loop handles a tick four times a second; where it did not, sites were not silent, but nobody listened."""
BUSY_MILLISECONDS = 5
"""Pause while a download waits for room."""
FAREWELL_SECONDS = 10.0
"""A finished run that is to end by itself waits at most so long for the sites to take their leave."""

FollowUp: TypeAlias = Stored | StoreFailed | Aggregated | AggregateFailed


@dataclass(slots=True)
class Daemon:
    """A federation's coordinator while it runs."""

    machine: Coordinator
    port: Port
    doorkeeper: Doorkeeper
    zap: Zap
    ledger: Ledger
    store: Store
    merging: Merging
    enrolment: Enrolment
    console: Console
    journal: Journal
    downloads: Downloads
    state: Path
    metrics: MetricsServer | None = None
    stopping: bool = False
    counts: Counts = field(default_factory=Counts)
    _merging_since: float = 0.0
    _handled_at: float = 0.0
    _version: int = -1
    _next_tick: float = 0.0
    _next_status: float = 0.0
    _over_since: float | None = None

    def serve(self, *, exit_when_finished: bool) -> None:
        """Serve until a signal, or with `exit_when_finished` until the run is over and the sites know."""
        self._carry_out_all(self.machine.start(time.monotonic()))
        wait = 0
        while not self.stopping and not (exit_when_finished and self._is_over()):
            self._wait(wait)
            if full := self.doorkeeper.look():
                self.note(full)
            for arrived in self.port.receive():
                self._take(arrived)
            self.downloads.write_new()
            sending = self.port.pump()
            merged = self.merging.poll()
            if merged:
                self.counts.merges += 1
                self.counts.merge_seconds += time.monotonic() - self._merging_since
                self._handle(merged)
            self._tick()
            wait = {"more": 0, "blocked": BUSY_MILLISECONDS, "idle": int(TICK_SECONDS * 1000)}[sending]
        self._handle(Stopping())
        self.downloads.write()
        self.note(Note("ended"))

    def note(self, note: Note) -> None:
        """Log a note and show it."""
        if self.journal.write(note):
            self.console.note(note)

    def _wait(self, milliseconds: int) -> None:
        """Wait for a message, the end of a merge, or so long."""
        poller = zmq.Poller()
        poller.register(self.port.socket, zmq.POLLIN)
        for descriptor in self.merging.descriptors():
            poller.register(descriptor, zmq.POLLIN)
        poller.poll(milliseconds)

    def _take(self, arrived: Arrived) -> None:
        content = arrived.content
        match self.zap.doors.peers.get(arrived.user):
            case Site(name) if isinstance(content, Rotate):
                rotated = Note("rotated", {"site": name, "key": fingerprint(content.signing_key)})
                self._answer(arrived, self.enrolment.rotate(name, content, time.time()), rotated)
            case Site(name):
                self.counts.received[name] += len(arrived.body)
                self._handle(_event(name, arrived))
            case Invitee(token_key) if isinstance(content, Enrol):
                enrolled = Note("enrolled", {"site": content.site})
                self._answer(arrived, self.enrolment.answer(token_key, content, time.time()), enrolled)
            case Invitee():
                self._refuse(arrived, Refuse("token", "an invitation's key lets you enrol and nothing else"))
            case None:
                self._refuse(arrived, Refuse("revoked", "this key was revoked or replaced; ask for an invitation"))

    def _answer(self, arrived: Arrived, answer: Answer, joined: Note) -> None:
        if answer.joined:
            self.note(joined)
            self._look_at_roster()
        if isinstance(answer.message, Refuse):
            self._refuse(arrived, answer.message)
        else:
            self._say(arrived.route, answer.message, answer.body)

    def _refuse(self, arrived: Arrived, answer: Refuse) -> None:
        site = arrived.user.removeprefix("enrol:").partition(":")[0]  # whose key it is, not who it says it is
        self.note(Note("refused", {"site": site, "code": answer.code, "reason": answer.reason}))
        self._say(arrived.route, answer)

    def _say(self, route: bytes, message: FromCoordinator, body: bytes = b"") -> None:
        if isinstance(message, Refuse):
            self.counts.refused[message.code] += 1
        self.port.send(route, message, body)

    def _tick(self) -> None:
        now = time.monotonic()
        if now < self._next_tick:
            return
        self._next_tick = now + TICK_SECONDS
        self.zap.check()
        if self.ledger.version != self._version:
            self._look_at_roster()
        self._name_refused()
        self._handle(Tick())
        status = self.machine.status()
        self.console.show(View(status, self.counts.moved, now))
        if self.metrics:
            self.metrics.show(Figures.of(status, self.counts))
        if now < self._next_status:
            return
        self._next_status = now + STATUS_SECONDS
        self.downloads.write()
        draft = self.state / f".{STATUS}"
        moved = {"received": self.counts.received, "sent": self.counts.sent}
        draft.write_text(json.dumps({"time": time.time(), "status": asdict(status), **moved}))
        draft.replace(self.state / STATUS)

    def _name_refused(self) -> None:
        """Say whose keys the ZAP handler turned away: the other side is told the same."""
        strangers = self.zap.refused() - self.zap.doors.users.keys()  # a token may be younger than our last look
        members = self.ledger.roster().members if strangers else ()
        for key in strangers:
            owner = next((member.name for member in members if member.curve_key == key), "")
            code = "revoked" if owner else "unknown_site"
            self.counts.refused[code] += 1
            reason = "its key was revoked" if owner else f"key {fingerprint(key)} is not enrolled"
            self.note(Note("refused", {"site": owner, "code": code, "reason": reason}))

    def _look_at_roster(self) -> None:
        self._version = self.ledger.version
        roster = self.ledger.roster()
        self.zap.doors = Doors.of(roster, self.ledger.invites())
        self._handle(RosterChanged(roster))

    def _is_over(self) -> bool:
        status = self.machine.status()
        if status.state not in ("finished", "stopped"):
            return False
        now = time.monotonic()
        self._over_since = self._over_since or now
        gone = all(site.state in ("absent", "silent", "revoked") for site in status.sites)
        if not gone and now - self._over_since < FAREWELL_SECONDS:
            return False
        if status.state == "stopped":
            raise FedoapError(f"federation stopped: {status.reason}")
        return True

    def _handle(self, event: CoordinatorEvent) -> None:
        events = deque([event])
        while events:
            event = events.popleft()
            effects = self.machine.handle(event, self._now())
            events += self._carry_out_all(effects, event.site if isinstance(event, Received) else "")

    def _now(self) -> float:
        """Return the time, once the sites are excused for as long as a slow disk or the system held the loop up."""
        now = time.monotonic()
        held_up = now - (self._handled_at or now)
        if held_up > HELD_UP_SECONDS:
            self.machine.excuse(held_up)
        self._handled_at = now
        return now

    def _carry_out_all(self, effects: list[CoordinatorEffect], site: str = "") -> list[FollowUp]:
        follow_ups = []
        for effect in effects:
            follow_up = self._carry_out(effect, site)
            if follow_up:
                follow_ups.append(follow_up)
        return follow_ups

    def _carry_out(self, effect: CoordinatorEffect, site: str) -> FollowUp | None:
        match effect:
            case Send(route, message, body):
                self._say(route, message, body)
            case SendBlob(_, blob, at, upto):
                self.counts.sent[site] += upto - at
                self.downloads.note(site, blob, upto - at)
                self.port.send_blob(effect, site)
            case Aggregate():
                self._merging_since = time.monotonic()
                return self.merging.start(effect)
            case Note():
                self.note(effect)
            case _:
                return self.store.apply(effect)
        return None


def _event(site: str, arrived: Arrived) -> Received | Malformed:
    if isinstance(arrived.content, MessageError):
        return Malformed(site, arrived.route, str(arrived.content))
    return Received(site, arrived.route, arrived.content, arrived.body)
