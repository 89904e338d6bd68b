"""Lets libzmq through a proxy: listens on loopback, at a port that the system chose, and passes bytes on.

libzmq does not speak HTTP CONNECT, and does not say why a SOCKS5 proxy refused; so both go this way.
Whoever connects to the port reaches the coordinator and nothing else, and needs a key there.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedoap_node.tunnel import Proxy, ProxyError, Target, dial

DIAL_SECONDS = 15.0
RETRY_SECONDS = 0.1
BUFFER_BYTES = 1 << 18


class Relay:
    """Threads that carry each connection to `endpoint` on to the target; `fault` is why the last one failed."""

    def __init__(self, target: Target, proxy: Proxy) -> None:
        self._target, self._proxy = target, proxy
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.fault = ""
        self._open: set[socket.socket] = set()
        self._is_closed = False
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def close(self) -> None:
        """Take no more connections and cut those that stand."""
        with self._lock:
            self._is_closed = True
            for one in (self._listener, *self._open):
                _cut(one)
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed, or out of descriptors, which may be over in a while
                time.sleep(RETRY_SECONDS)
                continue
            threading.Thread(target=self._carry, args=(near,), name="relay-up", daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        try:
            far = dial(self._target, self._proxy, DIAL_SECONDS)
        except ProxyError as error:
            self.fault = str(error)
            near.close()
            return
        far.settimeout(None)
        self.fault = ""
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with near, far, self._standing(near, far):
            down = threading.Thread(target=_pass_on, args=(far, near), name="relay-down", daemon=True)
            down.start()
            _pass_on(near, far)
            down.join()

    @contextmanager
    def _standing(self, *ends: socket.socket) -> Iterator[None]:
        """Let `close` cut the connection as long as the context lasts."""
        with self._lock:
            self._open |= set(ends)
            if self._is_closed:
                for one in ends:
                    _cut(one)
        try:
            yield
        finally:
            with self._lock:
                self._open -= set(ends)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on until either end is gone, then cut both: ZMTP knows no half of a connection."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with suppress(OSError):
        while size := source.recv_into(buffer):
            sink.sendall(buffer[:size])
    _cut(source)
    _cut(sink)


def _cut(one: socket.socket) -> None:
    with suppress(OSError):  # cut already
        one.shutdown(socket.SHUT_RDWR)
