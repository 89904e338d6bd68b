"""Who is here: the coordinator's side of the handshake, and when each site was last heard.

A site opens with its protocol version, gets fresh random bytes, and signs them: then that connection
is the site's, until a younger one has proved itself in the same way. What decides is the age of the
challenge, not of its answer, so a late hello of a connection that is gone takes nothing away.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedoap.errors import RefusedError
from fedoap.identity import HELLO_CONTEXT, Member, hello_payload, is_signed
from fedoap.messages import PROTOCOL_VERSION, Challenge, Hello, Open

NONCE_BYTES = 32
CHALLENGES_A_SITE = 4
"""Connections of one site that may be in their handshake at a time; an older one has to open again."""


@dataclass(frozen=True, slots=True)
class _Door:
    """A connection that opened: `order` grows with each, so the younger of two is known."""

    route: bytes
    order: int
    nonce: bytes
    software: str


class Attendance:
    """The connections of all sites; identity comes from the connection's key, a route is only an address."""

    def __init__(
        self, federation: str, software: str, random_bytes: Callable[[int], bytes], clock: Callable[[], float]
    ) -> None:
        self._federation, self._software, self._random_bytes, self._clock = federation, software, random_bytes, clock
        self._doors: dict[str, tuple[_Door, ...]] = {}
        self._joined: dict[str, _Door] = {}
        self._heard: dict[str, float] = {}
        self._last_heard: dict[str, float] = {}
        self._runs: dict[str, str] = {}
        self._opened = 0

    def open(self, site: str, route: bytes, message: Open) -> Challenge:
        """Return the challenge for this connection, the same each time.

        Raises:
            RefusedError: the site speaks another version of the protocol.
        """
        if message.protocol != PROTOCOL_VERSION:
            raise RefusedError(
                "version",
                f"site {site} speaks protocol {message.protocol} ({message.software}), "
                f"but the coordinator speaks {PROTOCOL_VERSION} ({self._software})",
            )
        door = self._door(site, route) or self._new_door(site, route, message.software)
        return Challenge(PROTOCOL_VERSION, self._software, door.nonce, int(self._clock()))

    def hello(self, member: Member, route: bytes, message: Hello, now: float) -> bytes | None:
        """Make this connection the site's, and return the one whose place it took, if any.

        Raises:
            RefusedError: it never opened, the signature is wrong, or a younger connection has proved itself.
        """
        door = self._door(member.name, route)
        if door is None or door.nonce != message.nonce:
            raise RefusedError("not_joined", "hello answers no challenge of this connection: open again")
        payload = hello_payload(door.nonce, self._federation, member.name, member.curve_key, PROTOCOL_VERSION)
        if not is_signed(member.signing_key, message.signature, HELLO_CONTEXT, payload):
            raise RefusedError("bad_signature", f"hello is not signed by the key that site {member.name} enrolled")
        before = self._joined.get(member.name)
        if before is not None and before.order > door.order:
            raise _superseded(member.name)
        self._joined[member.name] = door
        self._runs[member.name] = door.software
        self.hear(member.name, now)
        return before.route if before is not None and before.route != route else None

    def require(self, site: str, route: bytes) -> None:
        """Return if this connection is the site's.

        Raises:
            RefusedError: it has not said hello, or a younger one took its place.
        """
        joined, door = self._joined.get(site), self._door(site, route)
        if joined is not None and joined.route == route:
            return
        if joined is None or (door is not None and door.order > joined.order):
            raise RefusedError("not_joined", "say hello first")
        raise _superseded(site)

    def hear(self, site: str, now: float) -> None:
        """Note a sign of life."""
        self._heard[site] = self._last_heard[site] = now

    def excuse(self, seconds: float) -> None:
        """Count it against no site that it was not heard for so long: nobody was."""
        self._heard = {site: at + seconds for site, at in self._heard.items()}

    def leave(self, site: str) -> None:
        """Forget a site's connections: it has to open again, and is not waited for."""
        for table in (self._joined, self._doors, self._heard):
            table.pop(site, None)

    def route(self, site: str) -> bytes | None:
        """Return where the site is to be reached."""
        joined = self._joined.get(site)
        return None if joined is None else joined.route

    def software(self, site: str) -> str:
        """Return what the site said that it runs when it was let in last, nothing where it never was."""
        return self._runs.get(site, "")

    def heard(self, site: str) -> float:
        """Return when the site was last heard, minus infinity where it never was or took its leave."""
        return self._heard.get(site, -math.inf)

    def last_heard(self, site: str) -> float | None:
        """Return when the site was last heard, though it may have left since; None where it never was."""
        return self._last_heard.get(site)

    def is_silent(self, site: str, since: float, now: float, silence_seconds: float) -> bool:
        """Return whether nothing was heard for too long; `since` is when listening began."""
        return now - max(since, self.heard(site)) > silence_seconds

    def _door(self, site: str, route: bytes) -> _Door | None:
        joined = self._joined.get(site)
        doors = self._doors.get(site, ()) if joined is None else (joined, *self._doors.get(site, ()))
        return next((door for door in doors if door.route == route), None)

    def _new_door(self, site: str, route: bytes, software: str) -> _Door:
        self._opened += 1
        door = _Door(route, self._opened, self._random_bytes(NONCE_BYTES), software)
        self._doors[site] = (*self._doors.get(site, ()), door)[-CHALLENGES_A_SITE:]
        return door


class Gathering:
    """Whether a federation may set out: a quorum is here, and the others had time to come.

    It does so once; from then on a quorum is enough.
    """

    def __init__(self, quorum: int, patience_seconds: float) -> None:
        self._quorum, self._patience = quorum, patience_seconds
        self._since: float | None = None
        self._is_over = False

    def is_over(self, here: int, expected: int, now: float) -> bool:
        """Return whether an exchange may be opened with so many sites that are here of those expected."""
        if here < self._quorum:
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        self._is_over = self._is_over or here >= expected or now - self._since >= self._patience
        return self._is_over


def _superseded(site: str) -> RefusedError:
    return RefusedError("superseded", f"another connection with the key of site {site} has said hello since")
