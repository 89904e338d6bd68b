"""Files that nobody needs any more, kept to be written over where a new file is needed.

A file that is overwritten keeps its blocks on the disk and its pages in memory. For a new one both have to be
found, zeroed and recorded, which can cost ten times as much as copying its bytes. Each round deletes files of
just the sizes that the next one needs.

A spare holds its old bytes until it is overwritten; whoever keeps it decides whether that is acceptable. A file
that is open or mapped in any process, or has another name, is never kept: its reader goes on reading what it
opened, as after any deletion.
"""

import fcntl
import os
from contextlib import suppress
from itertools import count
from pathlib import Path

MOST_SPARES = 16
"""Enough for what a few large sites leave each round; of many small ones the rest is deleted."""


class Spares:
    """Spare files in a folder of their own, `most` of them; what an earlier run left there is deleted."""

    def __init__(self, folder: Path, most: int = MOST_SPARES) -> None:
        self._folder, self._most, self._names = folder, most, count()
        self._sizes: dict[Path, int] = {}
        folder.mkdir(mode=0o700, exist_ok=True)
        for leftover in folder.iterdir():
            leftover.unlink()

    def keep(self, path: Path) -> None:
        """Take a file out of use: it is gone from its place, and a spare if it can be one."""
        spare = self._folder / str(next(self._names))
        path.rename(spare)  # first, so that nobody can open it between the look and the use
        size = _size_if_ours(spare)
        if not size:
            spare.unlink()
            return
        self._sizes[spare] = size
        while len(self._sizes) > self._most:
            self._delete(next(iter(self._sizes)))

    def take(self, path: Path, size: int) -> bool:
        """Put a spare of this size at the path, and return whether there was one; its bytes are arbitrary."""
        spare = next((one for one, its in self._sizes.items() if its == size), None)
        if spare is None:
            return False
        del self._sizes[spare]
        spare.rename(path)
        return True

    def clear(self) -> bool:
        """Delete all, and return whether there was any."""
        found = bool(self._sizes)
        for spare in list(self._sizes):
            self._delete(spare)
        return found

    def _delete(self, spare: Path) -> None:
        del self._sizes[spare]
        spare.unlink(missing_ok=True)


def _size_if_ours(path: Path) -> int:
    """Return the size of a file that nobody else holds in any way, else 0."""
    with suppress(OSError, AttributeError), path.open("rb") as file:  # not every system and file system can tell
        state = os.fstat(file.fileno())
        if state.st_nlink == 1:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # refused while anybody else has it open or mapped
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return state.st_size
    return 0
