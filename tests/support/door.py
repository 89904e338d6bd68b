"""A ROUTER that opens to one key, as the coordinator's port does, for the node's tests."""

import time
from types import TracebackType
from typing import Self, TypeAlias

import zmq
import zmq.auth.thread
from zmq.utils import z85

from fedoap.identity import curve_keys

SERVER, SITE, OTHER = (curve_keys(bytes([n]) * 32) for n in (1, 2, 3))
Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"


class Door:
    """A ROUTER that lets in whoever holds the site's key, as the coordinator does."""

    def __init__(self, context: Context, port: int = 0) -> None:
        self._guard = _guard(context)
        self._guard.configure_curve_callback("fedoap", self)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.curve_server = True
        self.socket.curve_publickey, self.socket.curve_secretkey = SERVER.public, SERVER.secret
        self.socket.zap_domain = b"fedoap"
        self.socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.endpoint = str(self.socket.get_string(zmq.LAST_ENDPOINT))

    def callback(self, _domain: str, key: bytes) -> bool:
        return bytes(z85.decode(key)) == SITE.public

    def close(self) -> None:
        self.socket.close(0)
        self._guard.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _guard(context: Context) -> zmq.auth.thread.ThreadAuthenticator:
    """Return a handler that runs; the address of one that was stopped a moment ago may still be taken."""
    until = time.monotonic() + 5
    while True:
        guard = zmq.auth.thread.ThreadAuthenticator(context)
        try:
            guard.start()
        except zmq.ZMQError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return guard
