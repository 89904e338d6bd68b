"""Descriptors for the coordinator's own files, whatever dials its port.

libzmq accepts connections until the process may open nothing more: then no blob can be opened, and a new
context would even end the process (`errno_assert` in libzmq's epoll.cpp). So the process runs with a limit
below what it may have; once connections have used that up, the port hangs up its listening socket, the rest
of the limit is the coordinator's own, and whoever is connected stays. It listens again when there is room.
"""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

from fedoap.protocol.events import Note

SPARE = 64
"""For ledger, blobs and the aggregation process; so many must be free again before the port listens."""
AT_HAND = 4
"""With fewer left the port shuts: a flood takes some more between a look and the next file of ours."""
LOOK_SECONDS = 1.0
NOTE_SECONDS = 60.0


def raise_limit(sites: int) -> None:
    """Allow as many open files as the sites' connections may need, as far as the system lets us, but for the spare."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wish = max(soft, 4 * sites + 256)
    most = wish if hard == resource.RLIM_INFINITY else min(wish, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most - SPARE if most > 4 * SPARE else most, hard))


def open_own(path: Path, flags: int, mode: int = 0o777) -> int:
    """Open a file of our own; where strangers hold all descriptors it is one of the spare, and the port shuts next."""
    try:
        return os.open(path, flags, mode)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        more = soft + AT_HAND if hard == resource.RLIM_INFINITY else min(soft + AT_HAND, hard)
        if error.errno != errno.EMFILE or more == soft:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        return open_own(path, flags, mode)


class Doorkeeper:
    """Opens and shuts the port; `shut` ends listening, `reopen` returns whether it listens again."""

    def __init__(self, shut: Callable[[], None], reopen: Callable[[], bool], clock: Callable[[], float]) -> None:
        self._shut, self._reopen, self._clock = shut, reopen, clock
        self._limit: int | None = None
        """The limit to go back to, where the port is shut."""
        self._seen: int | None = None
        """The limit as it was while the port was open, before `open_own` had to raise it."""
        self._look_at = self._quiet_until = 0.0

    def look(self) -> Note | None:
        """Shut the port if too few descriptors are left, open it if there are enough; return what to tell."""
        if self._limit is None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if self._seen is None or soft <= self._seen:
                self._seen = soft
                if _are_some_left():
                    return None
            return self._close_door(self._seen)
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._open_door(self._limit)
        return None

    def _close_door(self, soft: int) -> Note | None:
        self._shut()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = soft
        most = soft + SPARE if hard == resource.RLIM_INFINITY else min(soft + SPARE, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        now = self._clock()
        self._look_at = now + LOOK_SECONDS
        if now < self._quiet_until:
            return None
        self._quiet_until = now + NOTE_SECONDS
        return Note("port_full", {"limit": soft})

    def _open_door(self, limit: int) -> None:
        if _count() + min(SPARE, limit // 4) <= limit and self._reopen():
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            self._limit = None


def _count() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _are_some_left() -> bool:
    opened: list[int] = []
    try:
        for _ in range(AT_HAND):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401 - those before an error count
    except OSError:
        return False
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return True
