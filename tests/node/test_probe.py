"""What the doctor says of the line, each case with a real socket on loopback."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import zmq

from door import OTHER, SERVER, SITE, Context, Door
from fedoap.identity import signing_keys
from fedoap.messages import PROTOCOL_VERSION, Challenge, FromCoordinator, Refuse, encode
from fedoap_node import probe as probing
from fedoap_node.membership import Membership
from fedoap_node.probe import Finding, probe, skew
from fedoap_node.tunnel import Proxy
from proxies import ConnectProxy

MEMBER = Membership("demo", "hospital_a", "tcp://127.0.0.1:1", SERVER.public, bytes(32), SITE, signing_keys(bytes(32)))


class QuietHandler(BaseHTTPRequestHandler):
    """Answers whatever it is asked that it does not understand."""

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(autouse=True)
def _be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "STEP_SECONDS", 1.0)


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


def look(endpoint: str, proxy: str | None = None) -> list[Finding]:
    return list(probe(replace(MEMBER, endpoint=endpoint), Proxy.parse(proxy) if proxy else None))


def only(endpoint: str) -> str:
    """Return the text of the one finding, which is that the line is wrong."""
    (finding,) = look(endpoint)
    assert (finding.check, finding.verdict) == ("line", "wrong")
    assert "\n" not in finding.text
    return finding.text


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve one connection with the function."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


def test_a_name_that_does_not_resolve_is_told() -> None:
    assert "no-such-host.invalid: this machine cannot resolve the name" in only("tcp://no-such-host.invalid:7470")


def test_a_port_where_nothing_listens_is_told() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{held.getsockname()[1]}"

        assert f"{endpoint}: refused, nothing listens there; is the coordinator running" in only(endpoint)


def test_an_address_that_swallows_everything_is_told() -> None:
    """A full queue of connections on loopback drops what comes, as a firewall does."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        with closing(socket.create_connection(address)), closing(socket.socket()) as second:
            second.setblocking(False)
            second.connect_ex(address)

            said = only(f"tcp://127.0.0.1:{address[1]}")

    assert "no answer within 1 s; a firewall drops what is sent there" in said


def test_no_route_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(address: tuple[str, int], timeout: float) -> socket.socket:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)

    assert "no route: network is unreachable" in only("tcp://192.0.2.1:7470")


def test_a_web_server_in_the_coordinators_place_is_told_with_what_it_answered() -> None:
    """Planted bug: any answer taken for ZeroMQ."""
    server = HTTPServer(("127.0.0.1", 0), QuietHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()

    said = only(f"tcp://127.0.0.1:{server.server_port}")
    server.server_close()

    assert "TCP stands, but no ZeroMQ: it answered" in said
    assert "a web server or a proxy answers in its place" in said


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no ZeroMQ: it answered 'SSH-2.0-OpenSSH_9.2..'; another service"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "that is TLS: something on the way ends it"),
        (b"", "hung up without a word"),
    ],
)
def test_another_service_is_told(answer: bytes, expected: str) -> None:
    def say(connection: socket.socket) -> None:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(64)

    with listening(say) as endpoint:
        assert expected in only(endpoint)


def test_a_service_that_keeps_silent_is_told() -> None:
    with listening(lambda _: time.sleep(2.5)) as endpoint:
        assert "TCP stands, but not a word came within 1 s" in only(endpoint)


def test_zeromq_without_curve_is_told(context: Context) -> None:
    with context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")

        assert "speaks ZeroMQ with NULL, not CURVE" in only(f"tcp://127.0.0.1:{port}")


def test_a_coordinator_with_another_key_is_told(context: Context) -> None:
    with Door(context) as door:
        findings = list(probe(replace(MEMBER, endpoint=door.endpoint, server_key=OTHER.public), None))

    assert [(finding.check, finding.verdict) for finding in findings] == [("line", "ok"), ("key", "wrong")]
    assert "speaks ZeroMQ, but does not hold the coordinator's key" in findings[1].text


def test_a_key_that_is_not_enrolled_is_told(context: Context) -> None:
    with Door(context) as door:
        findings = list(probe(replace(MEMBER, endpoint=door.endpoint, curve=OTHER), None))

    assert [(finding.check, finding.verdict) for finding in findings] == [("line", "ok"), ("key", "wrong")]
    assert "site hospital_a: not enrolled there, or revoked; ask the operator" in findings[1].text


def answered(context: Context, message: FromCoordinator, proxy: str | None = None) -> list[Finding]:
    """Look at a coordinator that gives this one answer."""

    def serve() -> None:
        route, *_ = door.socket.recv_multipart()
        door.socket.send_multipart([route, encode(message), b""])

    with Door(context) as door:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        findings = look(door.endpoint, proxy)
        thread.join(5)
    return findings


def test_an_enrolled_site_is_told_what_the_coordinator_runs(context: Context) -> None:
    findings = answered(context, Challenge(PROTOCOL_VERSION, "fedoap 0.9", bytes(32), int(time.time())))

    assert [finding.check for finding in findings] == ["line", "key", "welcome", "clock"]
    assert {finding.verdict for finding in findings} == {"ok"}
    assert f"the coordinator runs fedoap 0.9, protocol {PROTOCOL_VERSION}" in findings[2].text


def test_a_refusal_is_told_with_its_reason(context: Context) -> None:
    finding = answered(context, Refuse("version", "site speaks protocol 1, but the coordinator speaks 2"))[-1]

    assert (finding.verdict, finding.check) == ("wrong", "welcome")
    assert "refused (version): site speaks protocol 1" in finding.text


def test_the_whole_way_is_looked_at_through_a_proxy(context: Context) -> None:
    """Planted bug: the line dialled straight."""
    proxy = ConnectProxy()
    findings = answered(context, Challenge(PROTOCOL_VERSION, "fedoap 0.9", bytes(32)), proxy.url())
    proxy.close()

    assert {finding.verdict for finding in findings} == {"ok"}
    assert f"through proxy {proxy.url()}" in findings[0].text
    assert len(proxy.asked) == 2


def test_a_proxy_that_refuses_is_told() -> None:
    proxy = ConnectProxy(refusal=403)
    (finding,) = look("tcp://fed.example.org:7470", proxy.url())
    proxy.close()

    assert finding.verdict == "wrong"
    assert "does not allow CONNECT to fed.example.org:7470" in finding.text


@pytest.mark.parametrize(
    ("seconds", "verdict", "expected"),
    [
        (100, "ok", "within 120 s"),
        (-600, "warning", "clock is 10 minutes behind the coordinator's: invitations expire"),
        (86400, "warning", "clock is 24.0 hours ahead of"),
    ],
)
def test_a_clock_far_off_is_a_warning(seconds: float, verdict: str, expected: str) -> None:
    finding = skew(seconds)

    assert finding.verdict == verdict
    assert expected in finding.text
