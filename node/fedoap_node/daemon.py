"""The node's loop: wait, hear, let the machine decide, do what it says. No decision lives here."""

import signal
import socket
import time
from collections import deque
from types import FrameType
from typing import Literal, assert_never

import zmq

import fedoap
from fedoap.config import SiteConfig
from fedoap.errors import MessageError, RefusedError, StorageError
from fedoap.identity import fingerprint
from fedoap.messages import Chunk
from fedoap.protocol.events import (
    Answered,
    BlobFailed,
    BlobStored,
    Committed,
    Connected,
    Disconnected,
    DropPart,
    FinishPart,
    KeepBlobs,
    Learned,
    Leave,
    Note,
    OpenPart,
    Rekeyed,
    Say,
    SayChunk,
    SiteEffect,
    SiteEvent,
    StartWork,
    Stopping,
    StopWork,
    Tick,
    WritePart,
)
from fedoap.protocol.site import Site
from fedoap_node.journal import Journal
from fedoap_node.link import Address, Link, News
from fedoap_node.membership import Membership
from fedoap_node.rotation import settle
from fedoap_node.state import SiteState
from fedoap_node.tunnel import Proxy
from fedoap_node.work import Work

TICK_MS = 200
LINGER_MS = 500
LONGEST_REMINDER_SECONDS = 300.0
MOST_UNSAID = 256
"""Messages that may wait to be sent before the node stops listening; one answer may add more."""
UNDECIDED = ("unreachable", "stranger", "proxy", "stopping")
"""Why a rotation may fail that has nothing to do with its keys."""
WARNINGS = ("refused", "disk", "stopped", "failed")


class Node:
    """One site's daemon. Call `run` once."""

    def __init__(self, member: Membership, state: SiteState, config: SiteConfig, journal: Journal) -> None:
        self._member, self._state, self._journal = member, state, journal
        self._proxy = Proxy.parse(config.network.proxy) if config.network.proxy else None
        self._site = Site(
            member.federation,
            member.site,
            member.federation_key,
            member.signing.secret,
            member.curve.public,
            have=state.blobs.stored(),
            partly=state.blobs.partly(),
            software=f"fedoap {fedoap.__version__}",
        )
        self._work = Work(state, config, journal)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link = self._dial(member)
        self._outbox: deque[Say | SayChunk] = deque()
        self._left: Leave | None = None
        self._revoked = ""
        self._stopping = False
        self._quiet_until, self._reminder_seconds = 0.0, 5.0
        self._wake, self._woken = socket.socketpair()

    def run(self, *, exit_when_finished: bool) -> None:
        """Serve until asked to end by a signal, or until the federation has ended if so told.

        Raises:
            RefusedError: the coordinator refuses this site for good, or gave the federation up.
        """
        self._catch_signals()
        try:
            while not self._stopping and not (exit_when_finished and self._left):
                self._turn()
            if self._left and self._left.code == "stopped" and not self._stopping:
                raise RefusedError("stopped", f"the federation has stopped: {self._left.reason}")
        finally:
            self._close()

    def _turn(self) -> None:
        self._wait()
        now = time.monotonic()
        for news in self._link.news(now):
            self._hear_of(news, now)
        for answer in self._link.receive() if self._hears else ():
            if isinstance(answer, MessageError):
                self._journal.note("malformed", f"coordinator sent nonsense: {answer}", level="warning")
            else:
                self._feed(Answered(*answer))
        for event in self._work.news():
            self._feed(event)
        self._feed(Tick())
        self._work.settle()
        self._link.dial(now)
        self._flush()
        if self._revoked:
            self._renew()

    def _wait(self) -> None:
        poller = zmq.Poller()
        wants_to_speak = bool(self._outbox) and self._link.up
        interest = (zmq.POLLIN if self._hears else 0) | (zmq.POLLOUT if wants_to_speak else 0)
        poller.register(self._link.socket, interest)
        poller.register(self._link.monitor, zmq.POLLIN)
        for descriptor in (self._woken.fileno(), *self._work.descriptors()):
            poller.register(descriptor, zmq.POLLIN)
        poller.poll(TICK_MS)

    @property
    def _hears(self) -> bool:
        """Whether to listen to the coordinator: not while it takes too little of what it has asked for."""
        return len(self._outbox) < MOST_UNSAID

    def _hear_of(self, news: News, now: float) -> None:
        endpoint = self._member.endpoint
        match news:
            case News.UP:
                self._quiet_until, self._reminder_seconds = 0.0, 5.0
                self._journal.note("connected", f"connected to {endpoint}")
                self._feed(Connected())
            case News.DOWN:
                self._journal.note("disconnected", f"connection to {endpoint} broke; dialling again", level="warning")
                self._outbox.clear()
                self._feed(Disconnected())
            case News.NO_ANSWER:
                self._remind(f"nobody answers at {endpoint}; dialling again at growing pauses", now)
            case News.STRANGER:
                self._remind(f"what answers at {endpoint} does not prove to be the coordinator; dialling again", now)
            case News.PROXY:
                self._remind(f"{self._link.fault}; dialling again at growing pauses", now)
            case News.KEY_REFUSED:
                whom = f"site {self._member.site}: its key is not enrolled at {endpoint}, or was revoked"
                self._revoked = f"{whom}; ask the federation's operator"
            case _:
                assert_never(news)

    def _remind(self, text: str, now: float) -> None:
        if now < self._quiet_until:
            return
        self._journal.note("waiting", text, level="warning")
        self._quiet_until = now + self._reminder_seconds
        self._reminder_seconds = min(2 * self._reminder_seconds, LONGEST_REMINDER_SECONDS)

    def _feed(self, event: SiteEvent) -> None:
        """Let the machine handle the event and whatever carrying out its effects brings about."""
        events = deque([event])
        while events:
            for effect in self._site.handle(events.popleft(), time.monotonic()):
                outcome = self._carry_out(effect)
                if outcome is not None:
                    events.append(outcome)

    def _carry_out(self, effect: SiteEffect) -> SiteEvent | None:
        match effect:
            case Say() | SayChunk():
                self._outbox.append(effect)
            case OpenPart() | WritePart() | FinishPart() | DropPart():
                return self._store(effect)
            case KeepBlobs(blobs):
                self._state.blobs.keep_only(blobs)
            case StartWork(task, manifest):
                self._work.rest(over=False)
                return self._work.start(task, manifest)
            case StopWork():
                self._work.stop()
            case Committed(_, manifest):
                self._work.committed(manifest)
                self._state.results.keep_only(manifest.work)
            case Learned(plan):
                self._state.keep_plan(plan)
            case Leave():
                self._leave(effect)
            case Note(name, fields):
                level: Literal["info", "warning"] = "warning" if any(word in name for word in WARNINGS) else "info"
                self._journal.record(name, level, fields)
            case _:
                assert_never(effect)
        return None

    def _store(self, effect: OpenPart | WritePart | FinishPart | DropPart) -> SiteEvent | None:
        blobs = self._state.blobs
        try:
            match effect:
                case OpenPart(part, _, at, blob):
                    assert blob is not None, "a site's part is described by its blob's manifest"
                    blobs.open(part, blob, at)
                case WritePart(part, at, data):
                    blobs.write(part, at, data)
                case FinishPart(part, blob):
                    blobs.finish(part, blob)
                    return BlobStored(blob.id)
                case DropPart(part):
                    blobs.drop(part)
        except StorageError as error:
            self._journal.note("disk", str(error), level="error")
            return BlobFailed(effect.part, str(error))
        return None

    def _leave(self, leave: Leave) -> None:
        if leave.code == "revoked":
            self._revoked = f"site {self._member.site}: refused by the coordinator: {leave.reason}"
            return
        if leave.code not in ("finished", "stopped"):
            raise RefusedError(leave.code, f"site {self._member.site}: refused by the coordinator: {leave.reason}")
        if self._left is None or self._left != leave:
            self._journal.note(leave.code, f"the federation has {leave.code}: {leave.reason}", reason=leave.reason)
        self._left = leave
        self._work.rest(over=True)

    def _renew(self) -> None:
        """Take up the keys that `rotate` left, if it was that; what the worker does goes on.

        Raises:
            RefusedError: this site's keys are the same, so they were revoked.
        """
        why, self._revoked = self._revoked, ""
        try:
            member = settle(self._state.folder, self._proxy)
        except RefusedError as error:
            if error.code not in UNDECIDED:
                raise
            self._journal.note("waiting", str(error), level="warning")
            member = self._member  # the old key is dialled with, and refused, and so this is tried again
        else:
            if member.curve == self._member.curve:
                raise RefusedError("revoked", why)
            self._journal.note("rotated", f"this site has new keys: {fingerprint(member.signing.public)}")
        self._link.close()
        self._outbox.clear()
        self._member, self._link = member, self._dial(member)
        self._feed(Rekeyed(member.signing.secret, member.curve.public))

    def _dial(self, member: Membership) -> Link:
        return Link(self._context, Address(member.endpoint, member.server_key, self._proxy), member.curve)

    def _flush(self) -> None:
        """Send what is due, as far as the connection takes it."""
        while self._outbox and self._link.takes_more:
            match self._outbox[0]:
                case Say(message, body):
                    sent = self._link.send(message, body)
                case SayChunk(upload, blob, at, size):
                    sent = self._link.send(Chunk(upload, at), self._work.chunk(blob, at, size))
            if not sent:
                break
            self._outbox.popleft()
        if not self._link.up:
            self._outbox.clear()  # whatever was said is asked again on the next connection

    def _catch_signals(self) -> None:
        def stop(_number: int, _frame: FrameType | None) -> None:
            self._stopping = True

        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)  # a signal ends the wait at once
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    def _close(self) -> None:
        """End the worker, say goodbye and let go of everything."""
        self._work.close()
        self._feed(Stopping())
        self._flush()
        self._link.close(LINGER_MS)
        self._context.term()
        self._state.close()
        signal.set_wakeup_fd(-1)
        self._wake.close()
        self._woken.close()
