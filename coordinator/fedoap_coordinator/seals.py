"""The secrets that open sealed uploads, one an exchange: `seals/<task>.key`, its owner's alone.

A secret is durable before its task is announced, and is deleted when the last upload that it opens is.
It is overwritten first; file systems and disks that write elsewhere than in place may keep the old bytes.
"""

import os
from collections.abc import Set
from pathlib import Path

from fedoap.errors import IdentityError, StorageError
from fedoap.identity import KEY_BYTES, read_private, sync_folder, write_private

SEALS = "seals"


def secret_of(state: Path, task: bytes) -> bytes | None:
    """Return the secret of an exchange, or nothing once it is deleted; writes nothing.

    Raises:
        IdentityError: its file is damaged, or others may read it.
    """
    path = seal_file(state, task)
    try:
        return read_private(path)
    except IdentityError:
        if path.exists():
            raise
        return None


def seal_file(state: Path, task: bytes) -> Path:
    """Return where the secret of an exchange lies in a state folder."""
    return state / SEALS / f"{task.hex()}.key"


class Seals:
    """The folder `seals` of a state folder."""

    def __init__(self, state: Path) -> None:
        self._state, self._folder = state, state / SEALS
        self._folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(state)  # else a power cut may take the folder away from around a synced secret

    def add(self, task: bytes, secret: bytes) -> None:
        """Keep the secret of an exchange; it is durable when this returns."""
        write_private(self.path(task), secret)

    def secret(self, task: bytes) -> bytes | None:
        """Return the secret of an exchange, or nothing once it is deleted.

        Raises:
            IdentityError: its file is damaged, or others may read it.
        """
        return secret_of(self._state, task)

    def keep_only(self, tasks: Set[bytes]) -> None:
        """Delete the secrets of all other exchanges."""
        names = {f"{task.hex()}.key" for task in tasks}
        doomed = [path for path in self._folder.iterdir() if path.name not in names]
        for path in doomed:
            _destroy(path)
        if doomed:
            sync_folder(self._folder)

    def path(self, task: bytes) -> Path:
        """Return where the secret of an exchange lies."""
        return seal_file(self._state, task)


def _destroy(path: Path) -> None:
    try:
        with path.open("r+b") as file:
            file.write(bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
    except OSError as error:
        raise StorageError(f"{path}: seal's key cannot be deleted: {error.strerror}") from None
