"""Writes down which published blob left for which site, without a flush to disk for each chunk.

That a blob is leaving is in the ledger before its first byte goes; how much went and when last follows
every few seconds. So a crash can lose figures of its last seconds, never that a site was given a blob.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.rows import Download

REMEMBERED = 4
"""Blobs of a site of which it is known that they are in the ledger: to write one again does no harm."""


@dataclass(slots=True)
class Downloads:
    """What left since it was written down last; `clock` gives Unix time in seconds."""

    ledger: Ledger
    clock: Callable[[], float]
    _pending: dict[tuple[str, bytes], Download] = field(default_factory=dict)
    _written: dict[str, deque[bytes]] = field(default_factory=dict)
    _has_new: bool = False

    def note(self, site: str, blob: bytes, size: int) -> None:
        """Note that so many bytes of a blob are about to leave."""
        now, known = self.clock(), self._written.setdefault(site, deque(maxlen=REMEMBERED))
        before = self._pending.get((site, blob))
        first, total = (before.first, before.bytes) if before else (now, 0)
        self._pending[site, blob] = Download(site, blob, first, now, total + size)
        self._has_new = self._has_new or blob not in known

    def write_new(self) -> None:
        """Write everything down if a site is about to get a blob that it had nothing of before."""
        if self._has_new:
            self.write()

    def write(self) -> None:
        """Write everything down."""
        if self._pending:
            self.ledger.add_downloads(self._pending.values())
        for site, blob in self._pending:
            if blob not in self._written[site]:
                self._written[site].append(blob)
        self._pending.clear()
        self._has_new = False
