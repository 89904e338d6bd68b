"""The site's machine: `handle(event, now)` returns what the daemon has to do."""

from fedoap.protocol.events import SiteEffect, SiteEvent


class Site:
    """One site's part in one federation, as long as its daemon runs."""

    def __init__(
        self,
        federation: str,
        site: str,
        federation_key: bytes,
        signing_key: bytes,
        curve_key: bytes,
        *,
        have: frozenset[bytes] = frozenset(),
        software: str,
    ) -> None: ...

    def handle(self, event: SiteEvent, now: float) -> list[SiteEffect]:
        """Return what the daemon has to do, in order, because of one event."""
        return []
