"""The encrypted connection to the coordinator: one DEALER that dials out, and a monitor that tells how it goes.

The options match those of the coordinator's ROUTER. While nobody listens, libzmq dials again by itself,
at growing pauses. A handshake that fails it would repeat at once and for ever, or, where the key was not
accepted, never: so those pauses are ours. Through a proxy it dials a relay of our own, and all pauses are.
"""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import zmq

from fedoap.errors import ConfigError, MessageError
from fedoap.identity import KeyPair
from fedoap.messages import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    FromCoordinator,
    FromSite,
    decode_from_coordinator,
    encode,
)
from fedoap_node.relay import Relay
from fedoap_node.tunnel import Proxy, Target

WINDOW_CHUNKS = 16
"""Messages that may wait in either queue; of a larger window the rest waits as offsets in the daemon's outbox."""
RECEIVE_BATCH = 16
FIRST_PAUSE_MS, LONGEST_PAUSE_MS = 100, 30_000
HEARTBEAT_MS, SILENCE_MS = 5_000, 30_000
ZAP_REFUSED = 400

_EVENT = struct.Struct("=Hi")
"""A monitor's first frame: number of the event, and its value."""
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_EVENTS = _HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED


class News(Enum):
    """What happened to the connection."""

    UP = "up"
    DOWN = "down"
    NO_ANSWER = "no answer"
    """Nobody listens at the address, or a firewall drops what is sent there."""
    STRANGER = "stranger"
    """Somebody answers, but does not prove to hold the coordinator's key, or cannot judge ours: it may be stopping."""
    PROXY = "proxy"
    """The proxy is not there, or refuses: `Link.fault` says which."""
    KEY_REFUSED = "key refused"
    """The coordinator does not know this site's key, or not any more."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the coordinator listens, the CURVE key that it must prove to hold, and the proxy on the way, if any."""

    endpoint: str
    server_key: bytes
    proxy: Proxy | None = None


class Link:
    """The connection, up or down.

    Raises:
        ConfigError: the address cannot be dialled.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: Address, keys: KeyPair) -> None:
        self._relay = Relay(Target.of(address.endpoint), address.proxy) if address.proxy else None
        self._endpoint = self._relay.endpoint if self._relay else address.endpoint
        self.socket = context.socket(zmq.DEALER)
        _configure(self.socket, self._endpoint, address.server_key, keys)
        self.monitor = self.socket.get_monitor_socket(_EVENTS)
        self.up = False
        self._failures = 0
        self._dial_at: float | None = None
        try:
            self.socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            self.close()
            reason = (error.strerror or "unknown reason").lower()
            raise ConfigError(f"coordinator's address is {self._endpoint}, but cannot be dialled: {reason}") from None

    @property
    def fault(self) -> str:
        """Why the proxy let the last attempt down, or nothing."""
        return self._relay.fault if self._relay else ""

    def news(self, now: float) -> Iterator[News]:
        """Yield what happened since the last call."""
        while self.monitor.poll(0):
            event, value = _EVENT.unpack(self.monitor.recv_multipart()[0])
            news = self._interpret(event, value, now)
            if news is not None:
                yield news

    def dial(self, now: float) -> float | None:
        """Dial again if it is time to, and return when it will be, if a dial is due."""
        if self._dial_at is not None and now >= self._dial_at:
            self._dial_at = None
            self.socket.connect(self._endpoint)
        return self._dial_at

    @property
    def takes_more(self) -> bool:
        """Whether the connection is up and its queue not full."""
        return self.up and self.socket.poll(0, zmq.POLLOUT) != 0

    def send(self, message: FromSite, body: bytes = b"") -> bool:
        """Return whether the message was taken; it is not while the connection is down or its queue full."""
        try:
            self.socket.send_multipart([encode(message), body], zmq.DONTWAIT, copy=len(body) < CHUNK_BYTES // 4)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Iterator[tuple[FromCoordinator, memoryview] | MessageError]:
        """Yield messages that have arrived, at most a batch; each body lives until the next is asked for."""
        for _ in range(RECEIVE_BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            yield _decoded(frames)

    def close(self, linger_ms: int = 0) -> None:
        """Close the connection; what is queued has this long to leave."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(linger_ms)
        if self._relay:
            self._relay.close()

    def _interpret(self, event: int, value: int, now: float) -> News | None:
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.up, self._failures = True, 0
                return News.UP
            case zmq.EVENT_DISCONNECTED if self.up:
                self.up = False
                return News.DOWN
            case zmq.EVENT_CONNECT_RETRIED:
                return News.NO_ANSWER
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH if value == ZAP_REFUSED:
                self._pause(now)
                return News.KEY_REFUSED
            case _ if event & _HANDSHAKE_FAILED:
                self._pause(now)
                return News.PROXY if self.fault else News.STRANGER
            case _:
                return None

    def _pause(self, now: float) -> None:
        """Hang up and dial again later: twice as much later with each failure, and never all sites at once."""
        pause_ms = min(FIRST_PAUSE_MS * 2**self._failures, LONGEST_PAUSE_MS) * random.uniform(1, 2)  # noqa: S311
        self._failures = min(self._failures + 1, 20)
        self._dial_at = now + pause_ms / 1000
        try:
            self.socket.disconnect(self._endpoint)
        except zmq.ZMQError:  # hung up already
            return


def _configure(socket: "zmq.Socket[bytes]", endpoint: str, server_key: bytes, keys: KeyPair) -> None:
    socket.linger = 0
    socket.curve_serverkey = server_key
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.sndhwm = socket.rcvhwm = WINDOW_CHUNKS
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.immediate = True  # nothing is queued for a connection that is not there: it would arrive before `Open`
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = socket.heartbeat_ttl = SILENCE_MS
    socket.reconnect_ivl = random.randint(FIRST_PAUSE_MS, 2 * FIRST_PAUSE_MS)  # noqa: S311 - spreads the sites' dials
    socket.reconnect_ivl_max = random.randint(LONGEST_PAUSE_MS // 2, LONGEST_PAUSE_MS)  # noqa: S311
    socket.ipv6 = "[" in endpoint  # a name that has both addresses is dialled by IPv4 only


def _decoded(frames: list[zmq.Frame]) -> tuple[FromCoordinator, memoryview] | MessageError:
    if len(frames) != 2:
        return MessageError(f"message has {len(frames)} frames, but must have 2")
    header, body = frames[0].buffer, frames[1].buffer
    try:
        return decode_from_coordinator(header, len(body)), body
    except MessageError as error:
        return error
