"""The coordinator's one socket: a CURVE ROUTER that bounds what any peer can make it hold.

Three frames a message: ZeroMQ's return address, header, body. Whoever a message is from is told by
its own User-Id, never by its return address. Bytes of blobs leave under two limits, for each site, whose
share is the smaller the more sites there are, and for all together. A chunk counts until libzmq has
encrypted it; then its encrypted form lies there until the system takes it, and nobody says when, so each
connection counts for one chunk more until it is heard again. So memory depends neither on the number of
sites nor on the speed of their lines, and sites whose lines are slow leave room for the others.
"""

import errno
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import zmq

from fedoap.errors import ConfigError, MessageError
from fedoap.identity import KeyPair
from fedoap.messages import CHUNK_BYTES, MAX_MESSAGE_BYTES, Data, FromCoordinator, FromSite, decode_from_site, encode
from fedoap.protocol.events import SendBlob
from fedoap_coordinator.zap import DOMAIN

RECEIVE_QUEUE = 12
"""Messages of one connection that may wait unread. A window may be larger: what does not fit stays in the kernels'
buffers and at the site, as ZeroMQ stops reading; so this, times the uploads at once, bounds memory."""
SEND_QUEUE = 64
CHUNKS_PER_SITE = 4
CHUNKS_IN_ALL = 24
CONFIRM_SECONDS = 10.0
"""A peer that was sent a chunk counts for so long if it says nothing: it has read, or its line is dead."""
BATCH = 64
"""Messages read, or chunks sent, before the loop looks at anything else."""
REQUESTS_PER_ROUTE = 32
FRAMES = 3


@dataclass(frozen=True, slots=True)
class Arrived:
    """One message as it came: `content` is the reason where it is not a message."""

    user: str
    route: bytes
    content: FromSite | MessageError
    body: memoryview = field(default=memoryview(b""))


@dataclass(frozen=True, slots=True)
class _Inflight:
    """A chunk that libzmq may not have encrypted yet."""

    site: str
    route: bytes
    tracker: zmq.MessageTracker
    place: tuple[bytes, int, int]
    """Blob, offset and size."""
    data: bytes


@dataclass(frozen=True, slots=True)
class _Unconfirmed:
    """A connection that was not heard since its last chunk left; it counts until then at the most."""

    site: str
    until: float


@dataclass(slots=True)
class _Download:
    site: str
    route: bytes
    blob: bytes
    at: int
    upto: int


class Port:
    """The bound socket; `read` gives bytes of a stored blob, or nothing where it is gone."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        keys: KeyPair,
        read: Callable[[bytes, int, int], bytes | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self._read = read
        self._downloads: dict[bytes, deque[_Download]] = {}
        """By return address: each peer's ranges in the order asked for, as a chunk out of turn counts as lost."""
        self._inflight: list[_Inflight] = []
        self._unconfirmed: dict[bytes, _Unconfirmed] = {}
        """By return address."""
        self._clock = clock
        self._endpoint = ""
        # pyzmq makes a context for frames that are not copied when it meets the first one: not while sites dial
        zmq.Frame(b"first", copy=False)
        _configure(self.socket, keys)

    def bind(self, endpoint: str, last: str | None) -> str:
        """Listen, on the port used last where the endpoint leaves it open, and return the real endpoint.

        Raises:
            ConfigError: the address is taken or not this machine's.
        """
        self.socket.ipv6 = "[" in endpoint
        port = last.rpartition(":")[2] if last and endpoint.endswith(":*") else ""
        for wish in ([endpoint[:-1] + port] if port else []) + [endpoint]:
            try:
                self.socket.bind(wish)
            except zmq.ZMQError as error:
                reason = _why_not(error.errno or 0)
            else:
                self._endpoint = self.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
                return self._endpoint
        raise ConfigError(f"coordinator.bind is {endpoint}, but nothing can listen there: {reason}")

    def shut(self) -> None:
        """Take no more connections; those that stand go on."""
        self.socket.unbind(self._endpoint)

    def reopen(self) -> bool:
        """Listen again at the same address; return whether that was possible."""
        try:
            self.socket.bind(self._endpoint)
        except zmq.ZMQError:
            return False
        return True

    def receive(self) -> Iterator[Arrived]:
        """Yield the messages that have come, at most a batch of them."""
        for _ in range(BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            arrived = _open(frames)
            self._confirm(arrived.route)
            yield arrived

    def send(self, route: bytes, message: FromCoordinator, body: bytes = b"") -> bool:
        """Send a message unless the peer is gone or does not read: it asks again."""
        try:
            self.socket.send_multipart([route, encode(message), body], zmq.DONTWAIT)
        except zmq.ZMQError:
            return False
        return True

    def send_blob(self, effect: SendBlob, site: str) -> None:
        """Send a site bytes of a blob as soon as there is room; what is under way is not begun twice."""
        mine = self._downloads.get(effect.route, deque())
        if len(mine) < REQUESTS_PER_ROUTE and all(one.upto != effect.upto or one.blob != effect.blob for one in mine):
            mine.append(_Download(site, effect.route, effect.blob, effect.at, effect.upto))
            self._downloads[effect.route] = mine

    def pump(self) -> Literal["idle", "blocked", "more"]:
        """Send what there is room for of the blobs under way, a chunk to each peer in turn, at most a batch."""
        self._forget_sent()
        for _ in range(BATCH):
            moved = self._send_chunks()
            for mine in self._downloads.values():
                if mine[0].at >= mine[0].upto:
                    mine.popleft()
            self._downloads = {route: mine for route, mine in self._downloads.items() if mine}
            if not moved:
                return "blocked" if self._downloads else "idle"
        return "more"

    def close(self, linger_milliseconds: int = 0) -> None:
        """Close the socket; small messages may leave for so long."""
        self.socket.close(linger_milliseconds)

    def _forget_sent(self) -> None:
        self._inflight = [one for one in self._inflight if not one.tracker.done]
        now = self._clock()
        self._unconfirmed = {route: one for route, one in self._unconfirmed.items() if now < one.until}

    def _send_chunks(self) -> bool:
        """Send a chunk to each peer that has room, as long as there is room in all; return whether any went."""
        moved, share = False, self._share()
        for route, mine in list(self._downloads.items()):
            others = [one.site for other, one in self._unconfirmed.items() if other != route]
            if len(self._inflight) + len(others) + 1 >= CHUNKS_IN_ALL:
                break
            site = mine[0].site
            held = sum(one.site == site for one in self._inflight) + others.count(site)
            if held < share and self._send_chunk(mine[0]):
                moved = True
                self._downloads[route] = self._downloads.pop(route)  # behind those that are still to have their turn
        return moved

    def _share(self) -> int:
        """Return how many chunks one site may have under way."""
        sites = {mine[0].site for mine in self._downloads.values()} | {one.site for one in self._inflight}
        return max(1, min(CHUNKS_PER_SITE, CHUNKS_IN_ALL // max(1, len(sites)) - 1))

    def _confirm(self, route: bytes) -> None:
        """Count a peer no longer that has spoken since its last chunk left."""
        if route in self._unconfirmed and all(one.tracker.done for one in self._inflight if one.route == route):
            del self._unconfirmed[route]

    def _send_chunk(self, download: _Download) -> bool:
        size = min(CHUNK_BYTES, download.upto - download.at)
        place = (download.blob, download.at, size)
        # what lies in memory for one site serves the others that ask for it meanwhile: a name fixes the bytes
        data = next((one.data for one in self._inflight if one.place == place), None) or self._read(*place)
        if data is None or len(data) != size:
            download.at = download.upto
            return True
        body = zmq.Frame(data, track=True, copy=False)
        try:
            header = encode(Data(download.blob, download.at))
            self.socket.send_multipart([download.route, header, body], zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError:
            download.at = download.upto
            return True
        download.at += size
        assert isinstance(body.tracker, zmq.MessageTracker)
        self._inflight.append(_Inflight(download.site, download.route, body.tracker, place, data))
        self._unconfirmed[download.route] = _Unconfirmed(download.site, self._clock() + CONFIRM_SECONDS)
        return True


def _why_not(number: int) -> str:
    match number:
        case errno.EADDRINUSE:
            return "another process listens at that port, perhaps another coordinator; end it or choose another port"
        case errno.EADDRNOTAVAIL | errno.ENODEV:
            return "this machine has no such address; name one of its own, or 0.0.0.0 for all"
        case _:
            return zmq.strerror(number)


def _configure(socket: "zmq.Socket[bytes]", keys: KeyPair) -> None:
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    # Either of these alone would let every key in while no handler answers.
    socket.zap_domain = DOMAIN.encode()
    socket.zap_enforce_domain = True
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.rcvhwm, socket.sndhwm = RECEIVE_QUEUE, SEND_QUEUE
    socket.router_mandatory = True
    socket.router_handover = False
    socket.handshake_ivl = 5_000
    socket.heartbeat_ivl, socket.heartbeat_timeout, socket.heartbeat_ttl = 5_000, 30_000, 30_000
    socket.backlog = 1024
    socket.linger = 0


def _open(frames: list[zmq.Frame]) -> Arrived:
    user, route = _user(frames[0]), frames[0].bytes
    if len(frames) != FRAMES:
        return Arrived(user, route, MessageError(f"message has {len(frames)} frames, but must have {FRAMES}"))
    body = frames[2].buffer
    try:
        return Arrived(user, route, decode_from_site(frames[1].buffer, len(body)), body)
    except MessageError as error:
        return Arrived(user, route, error)


def _user(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
