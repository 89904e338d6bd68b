"""What is looked at in a ledger that nobody may write."""

import sqlite3
from pathlib import Path

import pytest

from fedoap.errors import StorageError
from fedoap_coordinator.evidence import DamagedError, read_rows
from fedoap_coordinator.ledger import Ledger


def test_a_disk_that_refuses_says_nothing_of_the_ledger(ledger: Ledger) -> None:
    """Planted bug: `verify` called a ledger broken that it could not open on a full disk."""

    def look(db: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
        raise error

    with pytest.raises(
        StorageError, match=r"fed\.sqlite: ledger cannot be read: disk I/O error; is the disk"
    ) as caught:
        read_rows(ledger.path, look)

    assert not isinstance(caught.value, DamagedError)


def test_a_ledger_that_is_none_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "fed.sqlite"
    path.write_bytes(b"garbage" * 1000)

    with pytest.raises(DamagedError, match="ledger cannot be read: file is not a database"):
        read_rows(path, lambda _: None)
