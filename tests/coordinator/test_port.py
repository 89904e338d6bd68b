"""The port: what comes in is one of our messages or a reason, what goes out is bounded."""

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest
import zmq

from fedoap.errors import ConfigError, MessageError
from fedoap.identity import KeyPair, Member, Roster, curve_keys
from fedoap.messages import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Ack,
    Bye,
    Chunk,
    Data,
    decode_from_coordinator,
    encode,
)
from fedoap.protocol.events import SendBlob
from fedoap_coordinator.port import CHUNKS_IN_ALL, CHUNKS_PER_SITE, CONFIRM_SECONDS, RECEIVE_QUEUE, Arrived, Port
from fedoap_coordinator.zap import Doors, Zap

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
SERVER, SITE = curve_keys(b"k" * 32), curve_keys(b"s" * 32)
BLOB = b"b" * 32


@dataclass
class Source:
    """One stored blob, and where it was read."""

    blob: bytes
    reads: list[int] = field(default_factory=list)

    def read(self, blob: bytes, at: int, size: int) -> bytes | None:
        self.reads.append(at)
        return self.blob[at : at + size] if blob == BLOB else None


@dataclass
class Link:
    """A coordinator's port and one member's socket, connected."""

    port: Port
    dealer: "zmq.Socket[bytes]"
    source: Source

    def say(self, *frames: bytes) -> list[Arrived]:
        self.dealer.send_multipart(frames)
        return self.hear()

    def hear(self) -> list[Arrived]:
        return list(self.port.receive()) if self.port.socket.poll(2000) else []

    def route(self) -> bytes:
        return self.say(encode(Bye()), b"")[0].route

    def collect(self, size: int) -> bytearray:
        got = bytearray()
        while len(got) < size:
            self.port.pump()
            while self.dealer.poll(5):
                header, body = self.dealer.recv_multipart()
                message = decode_from_coordinator(header, len(body))
                assert isinstance(message, Data)
                assert message.at == len(got)
                got += body
        return got


def dealer(context: Context, endpoint: str, keys: KeyPair = SITE) -> "zmq.Socket[bytes]":
    site = context.socket(zmq.DEALER)
    site.linger, site.rcvhwm = 0, 2
    site.curve_serverkey, site.curve_publickey, site.curve_secretkey = SERVER.public, keys.public, keys.secret
    site.connect(endpoint)
    return site


@pytest.fixture
def link(context: Context) -> Iterator[Link]:
    zap = Zap(context, Doors.of(Roster(1, (Member("hospital_a", SITE.public, b"s" * 32),)), ()))
    zap.start()
    source = Source(os.urandom(64 * CHUNK_BYTES + 77))
    port = Port(context, SERVER, source.read)
    site = dealer(context, port.bind("tcp://127.0.0.1:*", None))
    yield Link(port, site, source)
    site.close()
    port.close()
    zap.stop()


def test_a_message_arrives_with_its_sender_and_body(link: Link) -> None:
    (arrived,) = link.say(encode(Chunk(b"u" * 32, 7)), b"body")

    assert arrived.content == Chunk(b"u" * 32, 7)
    assert bytes(arrived.body) == b"body"
    assert arrived.user.startswith("hospital_a:")


@pytest.mark.parametrize("frames", [[], [b""] * 2, [b"x"] * 4, [b""] * 40])
def test_a_message_with_another_number_of_frames_is_refused(link: Link, frames: list[bytes]) -> None:
    (arrived,) = link.say(encode(Bye()), *frames) if len(frames) != 1 else link.say(encode(Bye()))

    assert isinstance(arrived.content, MessageError)
    assert str(arrived.content) == f"message has {len(frames) + 2} frames, but must have 3"
    assert arrived.user.startswith("hospital_a:")


@pytest.mark.parametrize(
    ("header", "body", "reason"),
    [
        (b"\xc1", b"", "header is not msgpack"),
        (b"x" * 5000, b"", "header is 5000 bytes, but at most 4096"),
        (encode(Bye()), b"x", "bye: body is 1 bytes, but at most 0"),
        (encode(Ack(b"t" * 32)), b"", "message type is 'ack'"),
    ],
)
def test_a_message_that_the_codec_refuses_arrives_as_its_reason(
    link: Link, header: bytes, body: bytes, reason: str
) -> None:
    (arrived,) = link.say(header, body)

    assert isinstance(arrived.content, MessageError)
    assert reason in str(arrived.content)


def test_a_frame_over_the_limit_ends_the_connection_and_nothing_arrives(link: Link) -> None:
    link.dealer.send_multipart([encode(Bye()), bytes(MAX_MESSAGE_BYTES + 1)])

    assert not link.port.socket.poll(300)


def test_a_strangers_huge_frame_is_dropped_at_once(link: Link) -> None:
    endpoint = link.port.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    taken = 0
    with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), timeout=3) as stranger:
        stranger.sendall(greeting)
        stranger.recv(64)
        try:
            stranger.sendall(b"\x06" + (6 << 30).to_bytes(8, "big"))
            for taken in range(64):  # noqa: B007
                stranger.sendall(bytes(CHUNK_BYTES))
        except OSError:
            pass

    assert taken < 16


def test_an_unread_flood_of_one_site_is_bounded(link: Link) -> None:
    link.dealer.sndhwm = 4
    sent = 0
    link.dealer.sndtimeo = 500
    try:
        for sent in range(200):  # noqa: B007
            link.dealer.send_multipart([encode(Chunk(b"u" * 32, 0)), bytes(CHUNK_BYTES)])
    except zmq.Again:
        pass

    assert sent < 60 + RECEIVE_QUEUE


def test_a_blob_arrives_whole_and_in_order(link: Link) -> None:
    route = link.route()
    link.port.send_blob(SendBlob(route, BLOB, 0, 3 * CHUNK_BYTES + 77), "hospital_a")

    assert link.collect(3 * CHUNK_BYTES + 77) == link.source.blob[: 3 * CHUNK_BYTES + 77]
    assert link.port.pump() == "idle"


def test_ranges_asked_for_one_after_the_other_arrive_in_that_order(link: Link) -> None:
    """Planted bug: a chunk of each range in turn, which the site takes for loss and asks for again."""
    route = link.route()
    for start in range(0, 12, 4):
        link.port.send_blob(SendBlob(route, BLOB, start * CHUNK_BYTES, (start + 4) * CHUNK_BYTES), "hospital_a")

    assert link.collect(12 * CHUNK_BYTES) == link.source.blob[: 12 * CHUNK_BYTES]


def test_a_site_that_does_not_read_is_sent_no_more_than_its_share(link: Link) -> None:
    """Planted bug: without the limit for each site, libzmq's queue takes all 65 chunks."""
    route = link.route()
    link.port.send_blob(SendBlob(route, BLOB, 0, len(link.source.blob)), "hospital_a")
    states = {link.port.pump() for _ in range(2000)}

    # What the two TCP buffers and the reader's queue hold has left libzmq's memory on our side.
    assert len(link.source.reads) < 40 + CHUNKS_PER_SITE
    assert "blocked" in states
    assert link.collect(len(link.source.blob)) == link.source.blob


def test_peers_that_say_nothing_are_sent_no_more_than_all_may_hold(context: Context) -> None:
    """Planted bug: a chunk that counts only until it is encrypted, so that each of a thousand peers holds one."""
    peers, now = 2 * CHUNKS_IN_ALL, [0.0]
    source = Source(os.urandom(2 * CHUNK_BYTES))
    zap = Zap(context, Doors.of(Roster(1, (Member("hospital_a", SITE.public, b"s" * 32),)), ()))
    zap.start()
    port = Port(context, SERVER, source.read, lambda: now[0])
    endpoint = port.bind("tcp://127.0.0.1:*", None)
    dealers = [dealer(context, endpoint) for _ in range(peers)]
    routes = []
    for one in dealers:
        one.send_multipart([encode(Bye()), b""])
        assert port.socket.poll(5000)
        routes += [arrived.route for arrived in port.receive()]
    for at, route in enumerate(routes):  # bytes of its own for each: those of another are not read again
        port.send_blob(SendBlob(route, BLOB, at, CHUNK_BYTES), route.hex())

    at_first = pumped(port, source)
    dealers[0].send_multipart([encode(Bye()), b""])
    assert port.socket.poll(5000)
    assert list(port.receive())
    after_one_spoke = pumped(port, source)
    now[0] += CONFIRM_SECONDS
    after_a_while = pumped(port, source)

    assert len(routes) == peers
    assert at_first == CHUNKS_IN_ALL - 1
    assert after_one_spoke == CHUNKS_IN_ALL
    assert after_a_while == 2 * CHUNKS_IN_ALL - 1
    for one in dealers:
        one.close()
    port.close()
    zap.stop()


@pytest.mark.parametrize("crowd", [8, 1])
def test_peers_that_do_not_read_leave_room_for_one_that_does(context: Context, crowd: int) -> None:
    """Planted bug: six connections with four chunks each, of as many slow sites or of one, hold all that there is."""
    keys = [curve_keys(bytes([number]) * 32) for number in range(crowd + 1)]
    members = tuple(Member(f"hospital_{number}", key.public, b"s" * 32) for number, key in enumerate(keys))
    zap = Zap(context, Doors.of(Roster(1, members), ()))
    zap.start()
    source = Source(os.urandom(32 * CHUNK_BYTES))
    port = Port(context, SERVER, source.read)
    endpoint = port.bind("tcp://127.0.0.1:*", None)
    deaf = [dealer(context, endpoint, keys[number % crowd]) for number in range(8)]
    good = dealer(context, endpoint, keys[crowd])
    for one in (*deaf, good):
        one.send_multipart([encode(Bye()), b""])
        assert port.socket.poll(5000)
        (arrived,) = port.receive()
        size = len(source.blob) if one is not good else 8 * CHUNK_BYTES
        port.send_blob(SendBlob(arrived.route, BLOB, 0, size), arrived.user)
    got, until = 0, time.monotonic() + 5.0
    while got < 8 and time.monotonic() < until:
        port.pump()
        while good.poll(1):
            good.recv_multipart()
            good.send_multipart([encode(Bye()), b""])
            got += 1
        list(port.receive())

    assert got == 8
    for one in (*deaf, good):
        one.close()
    port.close()
    zap.stop()


def pumped(port: Port, source: Source) -> int:
    """Return how many chunks have been read once the port has sent what it would."""
    for _ in range(50):
        port.pump()
        time.sleep(0.01)
    return len(source.reads)


def test_sites_that_fetch_the_same_at_the_same_time_share_one_read(context: Context) -> None:
    """Planted bug: bytes found by their blob and offset alone, so that the last site gets too many."""
    zap = Zap(context, Doors.of(Roster(1, (Member("hospital_a", SITE.public, b"s" * 32),)), ()))
    zap.start()
    source = Source(os.urandom(CHUNK_BYTES))
    port = Port(context, SERVER, source.read)
    endpoint = port.bind("tcp://127.0.0.1:*", None)
    dealers, got = [dealer(context, endpoint) for _ in range(3)], []
    for one, size in zip(dealers, (CHUNK_BYTES, CHUNK_BYTES, 100), strict=True):
        one.send_multipart([encode(Bye()), b""])
        assert port.socket.poll(5000)
        (arrived,) = port.receive()
        port.send_blob(SendBlob(arrived.route, BLOB, 0, size), arrived.route.hex())
    port.pump()
    for one in dealers:
        assert one.poll(5000)
        got.append(one.recv_multipart()[1])
        one.close()
    port.close()
    zap.stop()

    assert got == [source.blob, source.blob, source.blob[:100]]
    assert source.reads == [0, 0]


def test_the_same_request_repeated_is_sent_once(link: Link) -> None:
    route = link.route()
    for _ in range(5):
        link.port.send_blob(SendBlob(route, BLOB, 0, 2 * CHUNK_BYTES), "hospital_a")

    assert link.collect(2 * CHUNK_BYTES) == link.source.blob[: 2 * CHUNK_BYTES]
    assert link.port.pump() == "idle"
    assert not link.dealer.poll(100)


@pytest.mark.parametrize(("route", "blob"), [(b"gone", BLOB), (None, b"x" * 32)])
def test_a_download_to_a_peer_that_is_gone_or_of_a_blob_that_is_gone_is_dropped(
    link: Link, route: bytes | None, blob: bytes
) -> None:
    link.port.send_blob(SendBlob(route or link.route(), blob, 0, CHUNK_BYTES), "hospital_a")

    assert link.port.pump() == "idle"


def test_a_message_to_a_peer_that_is_gone_is_no_error(link: Link) -> None:
    assert not link.port.send(b"gone", Ack(b"t" * 32))


def test_an_open_port_is_the_one_used_last_if_it_is_free(context: Context) -> None:
    first = Port(context, SERVER, _nothing)
    endpoint = first.bind("tcp://127.0.0.1:*", None)
    second = Port(context, SERVER, _nothing)
    other = second.bind("tcp://127.0.0.1:*", endpoint)
    first.close()
    second.close()

    assert other != endpoint


def test_an_address_that_is_taken_is_said_in_one_line(context: Context) -> None:
    first, second = Port(context, SERVER, _nothing), Port(context, SERVER, _nothing)
    endpoint = first.bind("tcp://127.0.0.1:*", None)

    with pytest.raises(
        ConfigError, match=f"coordinator.bind is {endpoint}, but nothing can listen there: another process"
    ):
        second.bind(endpoint, None)
    first.close()
    second.close()


@pytest.mark.parametrize("endpoint", ["tcp://192.0.2.1:7470", "tcp://elsewhere:7470"])
def test_an_address_that_is_not_this_machines_is_said_in_words(context: Context, endpoint: str) -> None:
    """Planted bug: the system's `No such device (addr='tcp://elsewhere:7470')` for a name."""
    port = Port(context, SERVER, _nothing)

    with pytest.raises(
        ConfigError, match=f"coordinator.bind is {endpoint}, but .* this machine has no such address; name"
    ):
        port.bind(endpoint, None)
    port.close()


def _nothing(blob: bytes, at: int, size: int) -> bytes | None:
    return None
