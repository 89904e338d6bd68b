"""Room on the disk that nobody else can take, for a coordinator to end in good order when there is none left.

A file of 64 MB lies in the state folder. When the disk refuses the daemon it is given up, so that the
ledger can close and the log can say why; the next start makes it again, or says that there is no room yet.
"""

import os
from contextlib import suppress
from pathlib import Path

from fedoap.errors import DiskError

RESERVE = "reserve"
RESERVE_BYTES = 64 << 20


class Reserve:
    """The reserve of a state folder."""

    def __init__(self, state: Path, size: int = RESERVE_BYTES) -> None:
        self._path, self._size = state / RESERVE, size

    def make(self) -> None:
        """Take the room unless it is taken.

        Raises:
            DiskError: there is too little room, or the disk refused.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self._size)
            finally:
                os.close(descriptor)
        except OSError as error:
            self.give_up()
            raise DiskError(
                f"{self._path}: cannot set {self._size >> 20} MB aside: {error.strerror}; make room, then start again"
            ) from None

    def give_up(self) -> None:
        """Free the room; there need not be any."""
        with suppress(OSError):
            self._path.unlink()
