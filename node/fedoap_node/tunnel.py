"""A TCP connection to the coordinator, straight or through the hospital's proxy (SOCKS5 or HTTP CONNECT).

The proxy carries bytes and reads none: CURVE is between node and coordinator, whoever is in the way.
SOCKS5 is RFC 1928 with the passwords of RFC 1929, CONNECT is RFC 9110, section 9.3.6.
"""

import base64
import ipaddress
import re
import socket
import struct
from dataclasses import dataclass, field
from typing import Literal, Self
from urllib.parse import unquote

from fedoap.errors import FedoapError
from fedoap.fields import PROXY_PATTERN

LONGEST_ANSWER = 16_384
"""Bytes of a proxy's answer to CONNECT, its header fields included."""
LONGEST_SOCKS_WORD = 255
_SOCKS = 5
_OPEN_TO_ALL, _PASSWORD, _NONE_FITS = 0, 2, 255
_SOCKS_REPLIES = {
    1: "it failed and does not say why",
    2: "its rules do not allow that; ask who runs it to allow this host and port",
    3: "it finds no way to that network",
    4: "it finds no way to that host, or cannot resolve the name",
    5: "nothing listens there",
    6: "it waited in vain",
    7: "it does not know the command CONNECT",
    8: "it does not know this kind of address",
}


class ProxyError(FedoapError):
    """The proxy is not there, or refuses."""


@dataclass(frozen=True, slots=True)
class Target:
    """A host, without brackets, and a TCP port."""

    host: str
    port: int

    @classmethod
    def of(cls, endpoint: str) -> Self:
        """Return what an endpoint (`tcp://host:port`) names."""
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy, and who we are to it; shown without the password."""

    kind: Literal["socks5", "http"]
    at: Target
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Return the proxy that `network.proxy` names; the configuration has checked its form."""
        found = re.fullmatch(PROXY_PATTERN, url)
        assert found, "the configuration's model lets nothing else through"
        user, password = (unquote(found[part] or "") for part in ("user", "password"))
        kind: Literal["socks5", "http"] = "http" if found["kind"] == "http" else "socks5"
        return cls(kind, Target.of(f"tcp://{found['at']}"), user, password)

    def __str__(self) -> str:
        return f"{self.kind}://{self.at}"


def dial(target: Target, proxy: Proxy | None, seconds: float) -> socket.socket:
    """Return a connection to the target; no single step takes longer than `seconds`.

    Raises:
        ProxyError: the proxy is not there, or refuses; the text says what to do.
        OSError: without a proxy, what the system says.
    """
    if proxy is None:
        return socket.create_connection((target.host, target.port), seconds)
    try:
        connection = socket.create_connection((proxy.at.host, proxy.at.port), seconds)
    except (OSError, UnicodeError) as error:  # the latter of a name that no DNS could hold
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ProxyError(f"proxy {proxy}: cannot be reached: {reason}; see network.proxy in site.toml") from None
    try:
        return _through(connection, target, proxy)
    except TimeoutError:
        connection.close()
        raise ProxyError(f"proxy {proxy}: gave no answer within {seconds:.0f} s when asked for {target}") from None
    except OSError as error:
        connection.close()
        raise ProxyError(f"proxy {proxy}: hung up: {(error.strerror or str(error)).lower()}") from None
    except ProxyError:
        connection.close()
        raise


def _through(connection: socket.socket, target: Target, proxy: Proxy) -> socket.socket:
    if proxy.kind == "http":
        _connect_by_http(connection, target, proxy)
    else:
        _connect_by_socks(connection, target, proxy)
    return connection


def _connect_by_http(connection: socket.socket, target: Target, proxy: Proxy) -> None:
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.user:
        word = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {word}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):  # a byte at a time: what follows is the coordinator's
        byte = connection.recv(1)
        answer += byte
        if not byte or len(answer) > LONGEST_ANSWER:
            break
    first = printable(answer.partition(b"\r\n")[0])
    status = re.match(r"HTTP/1\.[01] (\d{3})", first)
    if status is None:
        raise ProxyError(f"proxy {proxy}: is no HTTP proxy, it answered {first!r}; see network.proxy in site.toml")
    if not status[1].startswith("2"):
        raise ProxyError(f"proxy {proxy}: {_http_reason(int(status[1]), target, proxy)} (it answered {first!r})")


def _http_reason(status: int, target: Target, proxy: Proxy) -> str:
    match status:
        case 407:
            return _wants_password(proxy)
        case 401 | 403 | 405:
            return f"does not allow CONNECT to {target}; ask who runs it to allow this host and port"
        case 502 | 503 | 504:
            return f"cannot reach {target}; is the coordinator running, and may the proxy go there?"
        case _:
            return f"refuses CONNECT to {target}"


def _connect_by_socks(connection: socket.socket, target: Target, proxy: Proxy) -> None:
    methods = bytes([_OPEN_TO_ALL, _PASSWORD] if proxy.user else [_OPEN_TO_ALL])
    connection.sendall(bytes([_SOCKS, len(methods)]) + methods)
    version, method = _exactly(connection, 2, proxy)
    if version != _SOCKS:
        raise ProxyError(f"proxy {proxy}: is no SOCKS5 proxy, it answered {printable(bytes([version, method]))!r}")
    if method == _PASSWORD and proxy.user:
        user, password = proxy.user.encode(), proxy.password.encode()
        if max(len(user), len(password)) > LONGEST_SOCKS_WORD:
            what = f"SOCKS5 takes user and password of at most {LONGEST_SOCKS_WORD} bytes"
            raise ProxyError(f"proxy {proxy}: {what}; see network.proxy in site.toml")
        connection.sendall(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
        if _exactly(connection, 2, proxy)[1]:
            raise ProxyError(f"proxy {proxy}: {_wants_password(proxy)}")
    elif method != _OPEN_TO_ALL:
        raise ProxyError(f"proxy {proxy}: {_wants_password(proxy)}")
    connection.sendall(bytes([_SOCKS, 1, 0]) + _socks_address(target))
    _, reply, _, kind = _exactly(connection, 4, proxy)
    if reply:
        raise ProxyError(f"proxy {proxy}: does not connect to {target}: {_SOCKS_REPLIES.get(reply, f'reply {reply}')}")
    size = {1: 4, 4: 16}.get(kind) or _exactly(connection, 1, proxy)[0]
    _exactly(connection, size + 2, proxy)


def _socks_address(target: Target) -> bytes:
    """Return the target's address; a name is for the proxy to resolve, this machine may not be able to."""
    try:
        literal = ipaddress.ip_address(target.host)
    except ValueError:
        name = target.host.encode()
        return bytes([3, len(name)]) + name + struct.pack("!H", target.port)
    return bytes([1 if literal.version == 4 else 4]) + literal.packed + struct.pack("!H", target.port)


def _exactly(connection: socket.socket, size: int, proxy: Proxy) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ProxyError(f"proxy {proxy}: hung up in the middle of its answer; is it a SOCKS5 proxy?")
        data += more
    return data


def _wants_password(proxy: Proxy) -> str:
    if proxy.user:
        return "does not accept the user and password that network.proxy in site.toml names"
    return f'asks who we are; in site.toml, set network.proxy = "{proxy.kind}://USER:PASSWORD@{proxy.at}"'


def printable(data: bytes, most: int = 60) -> str:
    """Return what somebody answered, as far as it may be shown on one line."""
    text = data[:most].decode("ascii", "replace")
    return "".join(letter if letter.isprintable() else "." for letter in text)
