"""Who may connect: the ZAP handler of the one CURVE port, and the proof that it is in force.

libzmq fails open: without a handler, or with `zap_domain` or `zap_enforce_domain` alone, a CURVE
server lets every key in. So the handler runs before the socket is bound, both options are set, and
`prove` dials the port with a stranger's key before the daemon says that it is ready.

A key admitted here only opens a connection. Each message's User-Id is looked up again in `Doors`,
which is how a site that was revoked loses its live connection.
"""

import os
from collections import deque
from dataclasses import dataclass
from typing import Final, TypeAlias

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from fedoap.errors import IdentityError
from fedoap.identity import KeyPair, Roster, curve_keys
from fedoap_coordinator.rows import Invite

DOMAIN: Final = "fedoap"
PROVE_MILLISECONDS = 5000
REFUSED_KEPT = 100


@dataclass(frozen=True, slots=True)
class Site:
    """The connection belongs to a member."""

    name: str


@dataclass(frozen=True, slots=True)
class Invitee:
    """The connection was opened with a token's key: it may enrol, nothing else."""

    token_key: bytes


Peer: TypeAlias = Site | Invitee


@dataclass(frozen=True, slots=True)
class Doors:
    """The keys that may connect; a User-Id names the key, so that a site's former key opens nothing."""

    users: dict[bytes, str]
    peers: dict[str, Peer]

    @classmethod
    def of(cls, roster: Roster, invites: tuple[Invite, ...]) -> "Doors":
        """Return the doors open to active members and, used up or not, to tokens: they deserve a reason."""
        users = {invite.token_key: f"enrol:{invite.site}:{_mark(invite.token_key)}" for invite in invites}
        peers: dict[str, Peer] = {users[invite.token_key]: Invitee(invite.token_key) for invite in invites}
        for member in roster.members:
            if not member.revoked:
                user = f"{member.name}:{_mark(member.curve_key)}"
                users[member.curve_key], peers[user] = user, Site(member.name)
        return cls(users, peers)


class Zap(ThreadAuthenticator):
    """A ZAP handler in a thread of its own; `doors` may be replaced at any time from another thread."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", doors: Doors) -> None:
        super().__init__(context)
        self.doors = doors
        self._probe: bytes | None = None
        self._refused: deque[bytes] = deque(maxlen=REFUSED_KEPT)
        self.configure_curve_callback(domain=DOMAIN, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a key (in Z85) may connect."""
        public = z85.decode(key)
        is_let_in = domain == DOMAIN and (public in self.doors.users or public == self._probe)
        if not is_let_in:
            self._refused.append(public)
        return is_let_in

    def refused(self) -> set[bytes]:
        """Return the keys that were refused since the last call, the latest of them if they are many."""
        keys = set()
        while self._refused:
            keys.add(self._refused.popleft())
        return keys

    def curve_user_id(self, client_public_key: bytes) -> str:
        """Return the User-Id of a key; an empty one, which no peer has, if it was withdrawn a moment ago."""
        return self.doors.users.get(client_public_key, "")

    def stop(self) -> None:
        """End the handler's thread; one that died already is not waited for."""
        if self.pipe and not self.is_alive():
            self.pipe.close()
            self.pipe = None  # type: ignore[assignment]  # as the parent does
        super().stop()

    def check(self) -> None:
        """Return if the handler's thread is alive.

        Raises:
            IdentityError: it died; libzmq now refuses every key.
        """
        if not self.is_alive():
            raise IdentityError("zap: the handler's thread died, so no site can connect; restart the coordinator")

    def prove(self, endpoint: str, server_key: bytes) -> None:
        """Return if a stranger's key is refused at the endpoint and a key known to this handler is let in.

        The second half keeps the first from passing by accident, as it would at a port that nobody answers.

        Raises:
            IdentityError: either went wrong; the daemon must not run.
        """
        stranger, known = curve_keys(os.urandom(32)), curve_keys(os.urandom(32))
        self._probe = known.public
        try:
            strangers = _dial(self.context, endpoint, server_key, stranger)
            friends = _dial(self.context, endpoint, server_key, known)
        finally:
            self._probe = None
            self._refused.clear()
        if strangers != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise IdentityError(f"zap: an unknown key was not refused at {endpoint} ({_say(strangers)}); not started")
        if friends != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            raise IdentityError(f"zap: a known key was not let in at {endpoint} ({_say(friends)}); not started")


def _dial(
    context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, server_key: bytes, keys: KeyPair
) -> zmq.Event | None:
    """Return how the handshake with an endpoint ends, or nothing if it does not.

    No context is made here: sites dial already, and libzmq ends the process where it finds no descriptor for one.
    """
    outcomes = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    with context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.ipv6 = "[" in endpoint
        dealer.curve_serverkey = server_key
        dealer.curve_publickey, dealer.curve_secretkey = keys.public, keys.secret
        monitor = dealer.get_monitor_socket(outcomes)
        try:
            dealer.connect(endpoint)
            if not monitor.poll(PROVE_MILLISECONDS):
                return None
            return zmq.Event(parse_monitor_message(monitor.recv_multipart())["event"])
        finally:
            dealer.disable_monitor()
            monitor.close()


def _mark(key: bytes) -> str:
    return key.hex()[:16]


def _say(event: zmq.Event | None) -> str:
    return str(event.name).lower() if event is not None else "no answer"
