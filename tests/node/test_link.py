import socket
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from door import OTHER, SERVER, SITE, Context, Door
from fedoap.errors import ConfigError, MessageError
from fedoap.identity import KeyPair
from fedoap.messages import Bye, Idle, Open, encode
from fedoap_node.link import Address, Link, News


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def door(context: Context) -> Iterator[Door]:
    made = Door(context)
    yield made
    made.close()


@pytest.fixture
def dial(context: Context) -> Iterator[Callable[..., Link]]:
    made: list[Link] = []

    def make(endpoint: str, keys: KeyPair = SITE, server: KeyPair = SERVER) -> Link:
        made.append(Link(context, Address(endpoint, server.public), keys))
        return made[-1]

    yield make
    for link in made:
        link.close()


def wait_for(link: Link, wanted: News, seconds: float = 8.0) -> list[News]:
    """Return the news up to the one that is wanted."""
    deadline = time.monotonic() + seconds
    heard: list[News] = []
    while time.monotonic() < deadline:
        link.monitor.poll(50)
        heard += link.news(time.monotonic())
        link.dial(time.monotonic())
        if wanted in heard:
            return heard
    raise AssertionError(f"{wanted} did not come, only {heard}")


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_messages_pass_both_ways_once_the_link_is_up(door: Door, dial: Callable[..., Link]) -> None:
    link = dial(door.endpoint)
    wait_for(link, News.UP)

    assert link.send(Bye())
    route, header, body = door.socket.recv_multipart()
    door.socket.send_multipart([route, encode(Idle("waiting", "for hospital_b")), b""])
    link.socket.poll(5000)

    assert (header, body) == (encode(Bye()), b"")
    assert [answer[0] for answer in link.receive() if not isinstance(answer, MessageError)] == [
        Idle("waiting", "for hospital_b")
    ]


@pytest.mark.parametrize("frames", [[b"x"], [b"x", b"", b""], [b"\xc1", b""], [encode(Open(1, "s")), b""]])
def test_what_is_no_message_of_the_coordinator_is_told_as_an_error(
    door: Door, dial: Callable[..., Link], frames: list[bytes]
) -> None:
    link = dial(door.endpoint)
    wait_for(link, News.UP)
    link.send(Bye())
    route = door.socket.recv_multipart()[0]

    door.socket.send_multipart([route, *frames])
    link.socket.poll(5000)

    assert [type(answer) for answer in link.receive()] == [MessageError]


def test_a_key_that_is_not_enrolled_is_told_as_refused(door: Door, dial: Callable[..., Link]) -> None:
    link = dial(door.endpoint, OTHER)

    wait_for(link, News.KEY_REFUSED)

    assert not link.up


def test_a_server_without_the_coordinator_s_key_is_a_stranger(door: Door, dial: Callable[..., Link]) -> None:
    link = dial(door.endpoint, SITE, OTHER)

    wait_for(link, News.STRANGER)

    assert not link.up


def test_pauses_between_failed_handshakes_grow(door: Door, dial: Callable[..., Link]) -> None:
    """Planted bugs: pauses left to libzmq, which dials again at once after a failed handshake; pauses of one length."""
    link = dial(door.endpoint, SITE, OTHER)
    started = time.monotonic()
    for _ in range(4):
        wait_for(link, News.STRANGER)

    assert time.monotonic() - started > 0.1 + 0.2 + 0.4


def test_a_coordinator_that_cannot_judge_the_key_is_dialled_again(context: Context, dial: Callable[..., Link]) -> None:
    """Planted bug: only 400, the key refused, taken for an end of the handshake: libzmq never dials again then."""
    with context.socket(zmq.REP) as guard, context.socket(zmq.ROUTER) as port:
        guard.bind("inproc://zeromq.zap.01")
        port.curve_server = True
        port.curve_publickey, port.curve_secretkey, port.zap_domain = SERVER.public, SERVER.secret, b"fedoap"
        port.bind("tcp://127.0.0.1:*")
        link = dial(str(port.get_string(zmq.LAST_ENDPOINT)))
        deadline, asked = time.monotonic() + 2, 0
        while time.monotonic() < deadline:
            if guard.poll(20):
                _, number, *_ = guard.recv_multipart()
                guard.send_multipart([b"1.0", number, b"500", b"", b"", b""])
                asked += 1
            assert News.KEY_REFUSED not in list(link.news(time.monotonic()))
            link.dial(time.monotonic())

    assert 2 <= asked <= 5


def test_an_address_to_listen_at_cannot_be_dialled_and_is_named(dial: Callable[..., Link]) -> None:
    """Planted bug: libzmq's error let through."""
    with pytest.raises(ConfigError, match=r"address is tcp://\*:7470, but cannot be dialled: invalid argument"):
        dial("tcp://*:7470")


def test_nobody_at_the_address_is_told_and_the_link_comes_up_later(context: Context, dial: Callable[..., Link]) -> None:
    port = unused_port()
    link = dial(f"tcp://127.0.0.1:{port}")
    wait_for(link, News.NO_ANSWER)

    door = Door(context, port)
    wait_for(link, News.UP)

    assert link.up
    door.close()


def test_nothing_said_while_the_link_is_down_arrives_later(context: Context, dial: Callable[..., Link]) -> None:
    """Planted bug: no ZMQ_IMMEDIATE, so that libzmq keeps messages for the next connection."""
    port = unused_port()
    link = dial(f"tcp://127.0.0.1:{port}")
    assert not link.send(Bye())
    door = Door(context, port)
    wait_for(link, News.UP)
    door.close()
    wait_for(link, News.DOWN)

    link.send(Bye())
    door = Door(context, port)
    wait_for(link, News.UP)
    link.send(Open(1, "again"))

    assert door.socket.recv_multipart()[1] == encode(Open(1, "again"))
    door.close()
