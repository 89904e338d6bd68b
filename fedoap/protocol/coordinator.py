"""The coordinator's machine: `handle(event, now)` returns what the daemon has to do."""

from collections.abc import Callable

from fedoap.config import FederationConfig
from fedoap.identity import Roster
from fedoap.protocol.events import CoordinatorEffect, CoordinatorEvent
from fedoap.protocol.history import History
from fedoap.protocol.status import Status


class Coordinator:
    """One federation, from the first hello to the last commit."""

    def __init__(
        self,
        config: FederationConfig,
        roster: Roster,
        history: History,
        *,
        signing_key: bytes,
        random_bytes: Callable[[int], bytes],
        software: str,
    ) -> None: ...

    def start(self, now: float) -> list[CoordinatorEffect]:
        """Return what is due right after a start: an open exchange may have become complete before a crash."""
        return []

    def handle(self, event: CoordinatorEvent, now: float) -> list[CoordinatorEffect]:
        """Return what the daemon has to do, in order, because of one event."""
        return []

    def status(self) -> Status:
        """Return how the federation stands, as of the last event."""
        return Status("waiting", "", None, 0, 0, 0, 0.0, 0.0, ())
