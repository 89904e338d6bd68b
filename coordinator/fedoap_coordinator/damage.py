"""What is wrong with a ledger, in words for its operator: no room, a damaged page, a row that makes no sense."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from fedoap.errors import DiskError, StorageError, TensorsError
from fedoap_coordinator.rows import RowError

LITTLE_BYTES = 1 << 20
"""With less room SQLite cannot make the files that it keeps beside an open ledger, and calls that an I/O error."""
REFUSED = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
MENDING = "fedoap-coordinator verify says where; put the whole state folder back from a backup"


class OnDisk(Protocol):
    """Something that lies in a file."""

    @property
    def path(self) -> Path:
        """The file."""


P = ParamSpec("P")
T = TypeVar("T")
L = TypeVar("L", bound=OnDisk)


def ledger_error(path: Path, error: sqlite3.Error) -> StorageError:
    """Return what SQLite's error means."""
    code = primary_code(error)
    if code == sqlite3.SQLITE_FULL or (code in REFUSED and shutil.disk_usage(path.parent).free < LITTLE_BYTES):
        what = "make room, then start the coordinator again; nothing that it acknowledged is lost"
        return DiskError(f"{path}: the disk is full: {what}")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StorageError(f"{path}: ledger is damaged: {error}; {MENDING}")
    return StorageError(f"{path}: ledger refused: {error}")


def primary_code(error: Exception) -> int:
    """Return SQLite's number of an error without the bytes that say at which call; 0 if it has none."""
    number = getattr(error, "sqlite_errorcode", 0)
    return number & 0xFF if isinstance(number, int) else 0


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what SQLite, and whoever parses its rows, find wrong into one error.

    Raises:
        StorageError: anything of the kind.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise ledger_error(path, error) from None
    except (TensorsError, RowError) as error:
        raise StorageError(f"{path}: ledger is damaged: {error}; {MENDING}") from None


def told_whole(read: Callable[Concatenate[L, P], T]) -> Callable[Concatenate[L, P], T]:
    """Return a ledger's method that reads rows: a damaged page may show at any of them."""

    def whole(ledger: L, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with told(ledger.path):
            return read(ledger, *args, **kwargs)

    whole.__doc__ = read.__doc__
    return whole
