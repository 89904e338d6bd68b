"""The site's side of the handshake: says who it is, again and again with growing pauses, until it is in."""

from typing import Literal

from fedoap.errors import RefusedError
from fedoap.identity import HELLO_CONTEXT, hello_payload, sign
from fedoap.messages import PROTOCOL_VERSION, Challenge, Hello, Open
from fedoap.protocol.events import Say, SiteEffect

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


class Greeting:
    """Where this connection stands: `down`, `opening` (a challenge is due), `answering` (a welcome is), `joined`."""

    def __init__(self, federation: str, site: str, signing_key: bytes, curve_key: bytes, software: str) -> None:
        self.state: Literal["down", "opening", "answering", "joined"] = "down"
        self._federation, self._site, self._software = federation, site, software
        self._signing_key, self._curve_key = signing_key, curve_key
        self._again_at, self._pause = 0.0, FIRST_PAUSE_SECONDS

    @property
    def is_joined(self) -> bool:
        """Whether the coordinator let the site in on this connection."""
        return self.state == "joined"

    def rekey(self, signing_key: bytes, curve_key: bytes) -> None:
        """Sign with other keys from now on; the connection under the old ones is over."""
        self._signing_key, self._curve_key = signing_key, curve_key
        self.state = "down"

    def connect(self, now: float) -> list[SiteEffect]:
        """Start over on a fresh connection."""
        self._pause = FIRST_PAUSE_SECONDS
        return self._open(now)

    def disconnect(self) -> None:
        """Wait for the connection to come back."""
        self.state = "down"

    def rejoin(self, now: float) -> None:
        """Start over after a pause: the coordinator does not know this connection, or is about to stop."""
        if self.state == "joined":
            self.state, self._again_at = "opening", now + self._pause

    def challenge(self, message: Challenge, now: float) -> list[SiteEffect]:
        """Return the signed answer to a challenge that is due.

        Raises:
            RefusedError: the coordinator speaks another version of the protocol.
        """
        if message.protocol != PROTOCOL_VERSION:
            raise RefusedError(
                "version",
                f"the coordinator speaks protocol {message.protocol} ({message.software}), "
                f"but this site speaks {PROTOCOL_VERSION} ({self._software})",
            )
        if self.state != "opening":
            return []
        payload = hello_payload(message.nonce, self._federation, self._site, self._curve_key, PROTOCOL_VERSION)
        self.state, self._again_at = "answering", now + self._pause
        return [Say(Hello(message.nonce, sign(self._signing_key, HELLO_CONTEXT, payload)))]

    def join(self) -> None:
        """Note that the coordinator said welcome."""
        self.state, self._pause = "joined", FIRST_PAUSE_SECONDS

    def due(self, now: float) -> list[SiteEffect]:
        """Return another attempt where the answer to the last one did not come."""
        if self.state in ("down", "joined") or now < self._again_at:
            return []
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return self._open(now)

    def _open(self, now: float) -> list[SiteEffect]:
        self.state, self._again_at = "opening", now + self._pause
        return [Say(Open(PROTOCOL_VERSION, self._software))]
