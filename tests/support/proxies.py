"""Small proxies on loopback, written from the RFCs: SOCKS5 (1928, 1929) and HTTP CONNECT (9110).

Each serves in threads of its own, keeps what it was asked for, and cuts what it carries when told to.
"""

import base64
import socket
import threading
from contextlib import suppress


class LittleProxy:
    """Passes connections on; `refusal` is what it answers instead, `asks_for` the user and password it wants."""

    scheme = ""

    def __init__(self, *, asks_for: str = "", refusal: int = 0) -> None:
        self.asks_for, self.refusal = asks_for, refusal
        self.asked: list[str] = []
        self._carried: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, user: str = "") -> str:
        return f"{self.scheme}://{user}{'@' if user else ''}{self.address}"

    def cut(self) -> None:
        """Break every connection that is carried now."""
        carried, self._carried = self._carried, []
        for one in carried:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def negotiate(self, near: socket.socket) -> socket.socket | None:
        """Return the connection that was asked for, after the last word of the negotiation."""
        raise NotImplementedError

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            far = self.negotiate(near)
            if far is None:
                return
            with far:
                self._carried += [near, far]
                back = threading.Thread(target=_pour, args=(far, near), daemon=True)
                back.start()
                _pour(near, far)
                back.join()


class ConnectProxy(LittleProxy):
    """HTTP CONNECT; `refusal` is a status code."""

    scheme = "http"

    def negotiate(self, near: socket.socket) -> socket.socket | None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += near.recv(1)
        first, *fields = head.decode().splitlines()
        self.asked.append(first)
        word = base64.b64encode(self.asks_for.encode()).decode()
        if self.asks_for and f"Proxy-Authorization: Basic {word}" not in fields:
            near.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n")
            return None
        if self.refusal:
            near.sendall(f"HTTP/1.1 {self.refusal} No\r\nContent-Length: 0\r\n\r\n".encode())
            return None
        host, _, port = first.split()[1].rpartition(":")
        far = socket.create_connection((host.strip("[]"), int(port)))
        first_words = far.recv(10)  # whoever reads the answer past its end takes them for a part of it
        near.sendall(b"HTTP/1.1 200 Connection established\r\nVia: a little proxy\r\n\r\n" + first_words)
        return far


class SocksProxy(LittleProxy):
    """SOCKS5; `refusal` is a reply code."""

    scheme = "socks5"

    def negotiate(self, near: socket.socket) -> socket.socket | None:
        _, count = _take(near, 2)
        methods = _take(near, count)
        wanted = 2 if self.asks_for else 0
        if wanted not in methods:
            near.sendall(b"\x05\xff")
            return None
        near.sendall(bytes([5, wanted]))
        if self.asks_for and not self._knows(near):
            return None
        _, _, _, kind = _take(near, 4)
        if kind == 3:
            host = _take(near, _take(near, 1)[0]).decode()
        else:
            family, size = (socket.AF_INET, 4) if kind == 1 else (socket.AF_INET6, 16)
            host = socket.inet_ntop(family, _take(near, size))
        port = int.from_bytes(_take(near, 2), "big")
        self.asked.append(f"{host}:{port}")
        near.sendall(bytes([5, self.refusal, 0, 3, 4]) + b"here" + bytes(2))
        return None if self.refusal else socket.create_connection((host, port))

    def _knows(self, near: socket.socket) -> bool:
        user = _take(near, _take(near, 2)[1]).decode()
        password = _take(near, _take(near, 1)[0]).decode()
        is_right = f"{user}:{password}" == self.asks_for
        near.sendall(bytes([1, not is_right]))
        return is_right


def _take(near: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = near.recv(size - len(data))
        if not more:
            raise OSError("the client hung up")
        data += more
    return data


def _pour(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for one in (source, sink):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
