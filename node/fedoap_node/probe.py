"""How far a site gets on the way to its coordinator: name, route, port, ZeroMQ, both keys, being let in.

It stops before the hello: asking for a challenge disturbs nobody, but a hello under this site's key would
shut out the node that runs.
"""

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import zmq

import fedoap
from fedoap.errors import FedoapError, MessageError, RefusedError
from fedoap.messages import PROTOCOL_VERSION, Challenge, Open, Refuse
from fedoap_node.link import Address, Link, News
from fedoap_node.membership import Membership
from fedoap_node.tunnel import Proxy, ProxyError, Target, dial, printable

STEP_SECONDS = 5.0
SKEW_SECONDS = 120
SKEW_MATTERS = "invitations expire by the coordinator's clock, and logs cannot be compared; set it right (NTP)"
GREETING_BYTES = 64
_SIGNATURE = b"\xff\0\0\0\0\0\0\0\x01\x7f"
_VERSION = b"\x03\0"
"""What a ZMTP 3.0 greeting (rfc.zeromq.org/spec/23) begins with; the mechanism would follow.

We leave it out: a peer with another mechanism would hang up, and we would not see its own greeting.
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; where it is not as it should be, the text says what to do."""

    check: str
    verdict: Literal["ok", "warning", "wrong"]
    text: str


class LineError(FedoapError):
    """Why the way to the coordinator ends here."""


def probe(member: Membership, proxy: Proxy | None) -> Iterator[Finding]:
    """Yield one finding for each step of the way; the first that is wrong is the last."""
    try:
        yield Finding("line", "ok", _reach(member.endpoint, proxy))
    except (LineError, ProxyError) as error:
        yield Finding("line", "wrong", str(error))
        return
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Link(context, Address(member.endpoint, member.server_key, proxy), member.curve)
    try:
        _shake_hands(link, member)
        yield Finding("key", "ok", f"{member.endpoint} is the coordinator, and knows the key of {member.site}")
        yield from _ask(link, member)
    except (LineError, RefusedError) as error:
        yield Finding("key", "wrong", str(error))
    finally:
        link.close()
        context.term()


def skew(seconds: float) -> Finding:
    """Return what to say of a clock that is this many seconds ahead of the coordinator's."""
    if abs(seconds) <= SKEW_SECONDS:
        return Finding("clock", "ok", f"within {SKEW_SECONDS} s of the coordinator's")
    size = f"{abs(seconds) / 60:.0f} minutes" if abs(seconds) < 7200 else f"{abs(seconds) / 3600:.1f} hours"
    where = "ahead of" if seconds > 0 else "behind"
    return Finding("clock", "warning", f"this machine's clock is {size} {where} the coordinator's: {SKEW_MATTERS}")


def _reach(endpoint: str, proxy: Proxy | None) -> str:
    """Return that something at the endpoint speaks ZeroMQ with CURVE."""
    target = Target.of(endpoint)
    try:
        with dial(target if proxy else _resolved(target), proxy, STEP_SECONDS) as connection:
            answer = _greet(connection)
    except ConnectionRefusedError:
        raise LineError(
            f"{endpoint}: refused, nothing listens there; is the coordinator running, the port right?"
        ) from None
    except TimeoutError:
        what = f"no answer within {STEP_SECONDS:.0f} s; a firewall drops what is sent there, or that machine is off"
        raise LineError(f"{endpoint}: {what}: have outbound TCP to this host and port allowed") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise LineError(
            f"{endpoint}: no route: {reason}; is this machine's network up, does a way lead there?"
        ) from None
    _judge(answer, endpoint)
    return f"{endpoint} speaks ZeroMQ with CURVE" + (f", through proxy {proxy}" if proxy else "")


def _resolved(target: Target) -> Target:
    family = socket.AF_INET6 if ":" in target.host else socket.AF_INET  # as the link dials
    try:
        found = socket.getaddrinfo(target.host, target.port, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        reason = (error.strerror or "unknown reason").lower()
        what = "this machine cannot resolve the name"
        todo = "ask your network's people, or set endpoint in identity/federation.json"
        raise LineError(f"{target.host}: {what} ({reason}); {todo}") from None
    return Target(str(found[0][4][0]), target.port)


def _greet(connection: socket.socket) -> bytes | None:
    """Return what was answered to our greeting, nothing where it hung up, None where it kept silent."""
    connection.settimeout(STEP_SECONDS)
    # a web server waits for the end of a line before it finds fault with it
    for words in (_SIGNATURE + _VERSION, b"\r\n\r\n"):
        answer = b""
        try:
            connection.sendall(words)
            while len(answer) < GREETING_BYTES:
                more = connection.recv(GREETING_BYTES - len(answer))
                if not more:
                    break
                answer += more
        except TimeoutError:
            if not answer:
                continue
        except ConnectionError:  # whoever hangs up with our words unread resets the connection
            pass
        return answer
    return None


def _judge(answer: bytes | None, endpoint: str) -> None:
    """Return if the answer is that of a ZeroMQ socket with CURVE."""
    if answer is None:
        what = f"TCP stands, but not a word came within {STEP_SECONDS:.0f} s; something on the way holds it back"
        raise LineError(f"{endpoint}: {what}: a firewall that inspects, or another service")
    if not answer:
        what = "TCP stands, but it hung up without a word; another service, or a firewall that inspects"
        raise LineError(f"{endpoint}: {what}: let the port through as plain TCP")
    if answer[:1] != _SIGNATURE[:1] or answer[9:10] != _SIGNATURE[9:]:
        raise LineError(f"{endpoint}: TCP stands, but no ZeroMQ: it answered {printable(answer)!r}; {_guess(answer)}")
    mechanism = answer[12:32].rstrip(b"\0")
    if len(answer) == GREETING_BYTES and mechanism != b"CURVE":
        what = f"speaks ZeroMQ with {printable(mechanism)}, not CURVE, so it is not the coordinator"
        raise LineError(f"{endpoint}: {what}; is the port right?")


def _guess(answer: bytes) -> str:
    if answer[:5] == b"HTTP/" or answer[:1] == b"<":
        return (
            "a web server or a proxy answers in its place; is the port right, must the node go through network.proxy?"
        )
    if answer[:2] in (b"\x15\x03", b"\x16\x03"):
        return "that is TLS: something on the way ends it; let the port through as plain TCP"
    return "another service listens there; is the port right?"


def _shake_hands(link: Link, member: Membership) -> None:
    deadline = time.monotonic() + 2 * STEP_SECONDS
    while (now := time.monotonic()) < deadline:
        link.monitor.poll(100)
        for news in link.news(now):
            match news:
                case News.UP:
                    return
                case News.STRANGER:
                    what = "speaks ZeroMQ, but does not hold the coordinator's key"
                    whose = "another federation's coordinator, or one whose state folder was lost; ask its operator"
                    raise LineError(f"{member.endpoint}: {what}: {whose}")
                case News.KEY_REFUSED:
                    what = f"site {member.site}: not enrolled there, or revoked"
                    raise LineError(f"{what}; ask the operator (`fedoap-coordinator sites`), and join again")
                case News.PROXY:
                    raise LineError(link.fault)
                case News.DOWN | News.NO_ANSWER:
                    continue
        link.dial(now)
    raise LineError(f"{member.endpoint}: greets, but ends no handshake; the coordinator may be overloaded: try again")


def _ask(link: Link, member: Membership) -> Iterator[Finding]:
    sent = time.time()
    link.send(Open(PROTOCOL_VERSION, f"fedoap {fedoap.__version__} doctor"))
    if not link.socket.poll(int(2 * STEP_SECONDS * 1000)):
        yield Finding("welcome", "wrong", f"{member.endpoint}: does not answer; the coordinator may be overloaded")
        return
    for answer in link.receive():
        match answer:
            case (Challenge(protocol, software, _, told), _):
                here = f"this site runs fedoap {fedoap.__version__}"
                yield Finding("welcome", "ok", f"the coordinator runs {software}, protocol {protocol}; {here}")
                if told:
                    yield skew((sent + time.time()) / 2 - told)
            case (Refuse(code, reason, _), _):
                yield Finding("welcome", "wrong", f"site {member.site}: refused ({code}): {reason}")
            case MessageError():
                yield Finding("welcome", "wrong", f"{member.endpoint}: speaks another protocol: {answer}")
            case (other, _):
                what = f"answers with {other.type}, but a challenge was due"
                yield Finding("welcome", "wrong", f"{member.endpoint}: {what}; is it of another version?")
