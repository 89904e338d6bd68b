"""The node behind a proxy: bytes pass unharmed, and a proxy that refuses is named with what to do."""

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from door import SERVER, SITE, Context, Door
from fedoap.errors import MessageError
from fedoap.messages import CHUNK_BYTES, Bye, Chunk, Idle, encode
from fedoap_node.link import Address, Link, News
from fedoap_node.relay import Relay
from fedoap_node.tunnel import Proxy, ProxyError, Target, dial
from proxies import ConnectProxy, LittleProxy, SocksProxy


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def door(context: Context) -> Iterator[Door]:
    with Door(context) as made:
        yield made


def wait_for(link: Link, wanted: News, seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        link.monitor.poll(20)
        if wanted in list(link.news(time.monotonic())):
            return
        link.dial(time.monotonic())
    raise AssertionError(f"{wanted} did not come; {link.fault}")


def through(context: Context, endpoint: str, url: str) -> Link:
    return Link(context, Address(endpoint, SERVER.public, Proxy.parse(url)), SITE)


@pytest.mark.parametrize("kind", [ConnectProxy, SocksProxy])
@pytest.mark.parametrize("user", ["", "fedoap:s3cret"])
def test_a_chunk_passes_both_ways_through_a_proxy(
    context: Context, door: Door, kind: type[LittleProxy], user: str
) -> None:
    """Planted bugs: the CONNECT answer read past its end; a relay that passes on one buffer only."""
    proxy = kind(asks_for=user)
    link = through(context, door.endpoint, proxy.url(user))
    body = os.urandom(CHUNK_BYTES)
    wait_for(link, News.UP)

    link.send(Chunk(bytes(32), 0), body)
    route, _, arrived = door.socket.recv_multipart()
    door.socket.send_multipart([route, encode(Idle("waiting", "for hospital_b")), b""])
    link.socket.poll(5000)
    answers = [answer for answer in link.receive() if not isinstance(answer, MessageError)]
    link.close()
    proxy.close()

    assert arrived == body
    assert [answer[0] for answer in answers] == [Idle("waiting", "for hospital_b")]
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("kind", [ConnectProxy, SocksProxy])
def test_a_connection_that_the_proxy_cuts_comes_back(context: Context, door: Door, kind: type[LittleProxy]) -> None:
    """Planted bug: a relay that ends with its first connection."""
    proxy = kind()
    link = through(context, door.endpoint, proxy.url())
    wait_for(link, News.UP)

    proxy.cut()
    wait_for(link, News.DOWN)
    wait_for(link, News.UP)
    assert link.send(Bye())

    assert door.socket.recv_multipart()[1] == encode(Bye())
    link.close()
    proxy.close()


@pytest.mark.parametrize(
    ("proxy", "user", "expected"),
    [
        (lambda: ConnectProxy(asks_for="a:b"), "", 'asks who we are; in site.toml, set network.proxy = "http://USER'),
        (lambda: ConnectProxy(asks_for="a:b"), "a:x", "does not accept the user and password that network.proxy"),
        (lambda: ConnectProxy(refusal=403), "", "does not allow CONNECT to fed.example.org:7470; ask who runs it"),
        (lambda: ConnectProxy(refusal=502), "", "cannot reach fed.example.org:7470; is the coordinator running"),
        (lambda: ConnectProxy(refusal=500), "", "refuses CONNECT to fed.example.org:7470 (it answered 'HTTP/1.1 500"),
        (lambda: SocksProxy(asks_for="a:b"), "", 'asks who we are; in site.toml, set network.proxy = "socks5://USER'),
        (lambda: SocksProxy(asks_for="a:b"), "a:x", "does not accept the user and password that network.proxy"),
        (lambda: SocksProxy(refusal=2), "", "does not connect to fed.example.org:7470: its rules do not allow that"),
        (lambda: SocksProxy(refusal=5), "", "does not connect to fed.example.org:7470: nothing listens there"),
    ],
)
def test_a_proxy_that_refuses_is_named_with_what_to_do(proxy: "type[LittleProxy]", user: str, expected: str) -> None:
    """Planted bugs: the status not looked at; a password in the text."""
    made = proxy()

    with pytest.raises(ProxyError) as caught:
        dial(Target("fed.example.org", 7470), Proxy.parse(made.url(user)), 5)
    made.close()

    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"proxy {made.url()}: ")
    assert user == "" or user not in str(caught.value)


@pytest.mark.parametrize(("kind", "other"), [("http", SocksProxy), ("socks5", ConnectProxy)])
def test_a_proxy_of_another_kind_is_named(kind: str, other: type[LittleProxy]) -> None:
    made = other()

    with pytest.raises(ProxyError, match=r"gave no answer|hung up|is no "):
        dial(Target("fed.example.org", 7470), Proxy.parse(f"{kind}://{made.address}"), 0.5)
    made.close()


def test_a_proxy_that_is_not_there_is_named(context: Context, door: Door) -> None:
    """The link says so too, again and again at growing pauses, and never that the coordinator is a stranger."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    link = through(context, door.endpoint, nowhere)

    wait_for(link, News.PROXY)

    assert link.fault == f"proxy {nowhere}: cannot be reached: connection refused; see network.proxy in site.toml"
    link.close()


def test_a_password_that_socks_cannot_carry_is_said() -> None:
    """Planted bug: the length in one byte as it is, at which the relay's thread ends without a word."""
    proxy = SocksProxy(asks_for="fedoap:s3cret")

    with pytest.raises(ProxyError, match="user and password of at most 255 bytes"):
        dial(Target("127.0.0.1", 1), Proxy.parse(proxy.url(f"fedoap:{'x' * 256}")), 5)


def test_a_proxy_s_name_that_no_dns_can_hold_is_said() -> None:
    with pytest.raises(ProxyError, match=r"proxy http://a\.\.b:1: cannot be reached: .*label"):
        dial(Target("127.0.0.1", 1), Proxy.parse("http://a..b:1"), 5)


def test_a_relay_that_ran_out_of_descriptors_goes_on_later(
    context: Context, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the first error taken for the end, after which the node never dials again."""
    accept, failures = socket.socket.accept, iter([OSError(errno.EMFILE, "Too many open files")])

    def sparse(self: socket.socket) -> tuple[socket.socket, object]:
        if threading.current_thread().name == "relay" and (error := next(failures, None)):
            raise error
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", sparse)
    proxy = ConnectProxy()
    relay = Relay(Target.of(door.endpoint), Proxy.parse(proxy.url("")))

    link = Link(context, Address(relay.endpoint, SERVER.public, None), SITE)
    wait_for(link, News.UP)

    assert link.up
    assert next(failures, None) is None
    link.close()
    relay.close()
    proxy.close()


def test_the_proxy_resolves_the_coordinators_name() -> None:
    """A hospital's inner machines often resolve no outer name. Planted bug: resolved here."""
    made = SocksProxy(refusal=4)

    with pytest.raises(ProxyError):
        dial(Target("no-such-name.invalid", 7470), Proxy.parse(made.url()), 5)
    made.close()

    assert made.asked == ["no-such-name.invalid:7470"]


def test_a_cut_costs_well_below_a_second(context: Context, door: Door) -> None:
    """Planted bug: a first pause of a second in `reconnect_ivl`."""
    forwarder = ConnectProxy()
    relay = Relay(Target.of(door.endpoint), Proxy.parse(forwarder.url()))
    link = Link(context, Address(relay.endpoint, SERVER.public), SITE)
    wait_for(link, News.UP)
    costs = []
    for _ in range(5):
        began = time.monotonic()
        forwarder.cut()
        wait_for(link, News.DOWN)
        wait_for(link, News.UP)
        costs.append(time.monotonic() - began)
    link.close()
    relay.close()
    forwarder.close()
    print(f"a cut costs {sorted(costs)[2]:.3f} s in the middle, {max(costs):.3f} s at most")  # noqa: T201

    assert sorted(costs)[2] < 0.6
