"""The ledger's rows as they lie there, nothing parsed or believed: what `verify` and `audit` look at.

The file is opened read-only; a coordinator may be writing it. Rows come from one moment (one read
transaction). A value of a type that its column never holds becomes one that no check accepts.
"""

import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from fedoap.chain import Link
from fedoap.errors import StorageError
from fedoap_coordinator.damage import primary_code
from fedoap_coordinator.ledger import BUSY_SECONDS, SCHEMA, SCHEMA_VERSION, check_version
from fedoap_coordinator.rows import Cell, Download, Row

T = TypeVar("T")
UNAVAILABLE = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN)
"""Errors of the system around the file, by their lowest byte: another moment may go well."""


class DamagedError(StorageError):
    """A ledger that SQLite cannot read, or rows of it that make no sense."""


@dataclass(frozen=True, slots=True)
class TaskEvidence:
    """A row of `tasks`; `outcome` is empty while the exchange is open."""

    number: int
    task: bytes
    packed: bytes
    signature: bytes
    opened: float
    closed: float
    outcome: str
    reason: str
    result: bytes


@dataclass(frozen=True, slots=True)
class UpdateEvidence:
    """A row of `updates`."""

    upload: bytes
    task: bytes
    site: str
    packed: bytes
    signature: bytes
    stored: float
    counted: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class PublishedEvidence:
    """A row of `published`; `exact` is empty where the blob was not rounded."""

    blob: bytes
    manifest: bytes
    exact: bytes
    kept: bool


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a ledger says."""

    damage: tuple[str, ...]
    """What SQLite itself finds wrong with the file."""
    federation: bytes
    plan: bytes
    tasks: tuple[TaskEvidence, ...]
    updates: tuple[UpdateEvidence, ...]
    published: tuple[PublishedEvidence, ...]
    links: tuple[Link, ...]
    site_keys: tuple[tuple[str, bytes], ...]
    """Each key that a site ever signed with."""
    downloads: tuple[Download, ...]

    def updates_of(self, task: bytes) -> tuple[UpdateEvidence, ...]:
        """Return the uploads of a task."""
        return tuple(row for row in self.updates if row.task == task)


def read_rows(path: Path, look: Callable[[sqlite3.Connection], T]) -> T:
    """Return what a function finds in a ledger that it cannot write.

    Raises:
        StorageError: there is none, or it is one of another version.
        DamagedError: SQLite cannot read it.
    """
    if not path.is_file():
        raise StorageError(f"{path}: no such ledger; name the configuration whose coordinator.state holds it")
    try:
        if not _is_in_use(path):
            # Nobody has it open. To lock it SQLite would make files, which a read-only medium forbids.
            found = _look(path, "immutable=1", look)
            if not _is_in_use(path):
                return found
        return _look(path, "mode=ro", look)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter from a message that quotes what is damaged
        said = f"{path}: ledger cannot be read: {error}"
        if primary_code(error) in UNAVAILABLE:
            raise StorageError(
                f"{said}; is the disk full or gone? this says nothing of what the ledger holds"
            ) from None
        raise DamagedError(said) from None


def read_evidence(path: Path) -> Evidence:
    """Return what the ledger says at this moment.

    Raises:
        StorageError: there is none, or it is one of another version.
        DamagedError: SQLite cannot read it.
    """
    return read_rows(path, _evidence)


def is_kept(path: Path, table: Literal["updates", "published"], name: bytes) -> bool:
    """Return whether the ledger wants a blob on the disk now: a coordinator at work may just have dropped it."""
    key = {"updates": "upload", "published": "blob"}[table]
    query = f"select kept from {table} where {key}=?"  # noqa: S608 - our own words
    return any(read_rows(path, lambda db: [bool(kept) for (kept,) in db.execute(query, (name,))]))


def _is_in_use(path: Path) -> bool:
    return path.with_name(f"{path.name}-wal").exists()


def _look(path: Path, how: str, look: Callable[[sqlite3.Connection], T]) -> T:
    uri = f"{path.absolute().as_uri()}?{how}"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_SECONDS)) as db:
        db.text_factory = lambda raw: raw.decode(errors="replace")
        check_version(db, path)
        db.execute("begin")
        return look(db)


def _evidence(db: sqlite3.Connection) -> Evidence:
    facts = {_text(name): _bytes(value) for name, value in db.execute("select name, value from facts")}
    tasks = db.execute(
        "select number, task, packed, signature, opened, closed, outcome, reason, result from tasks order by number"
    )
    updates = db.execute(
        "select upload, task, site, packed, signature, stored, counted, kept from updates order by site, stored"
    )
    published = db.execute("select blob, manifest, exact, kept from published order by made")
    links = db.execute("select number, packed, signature from records order by number")
    keys = db.execute("select site, signing_key from site_keys")
    downloads = db.execute("select site, blob, first, last, bytes from downloads order by first, rowid")
    damage = [_text(line) for (line,) in db.execute("pragma integrity_check") if line != "ok"]
    damage += [f"{name}: is not made as in version {SCHEMA_VERSION}" for name in _made_otherwise(db)]
    return Evidence(
        damage=tuple(damage),
        federation=facts.get("federation", b""),
        plan=facts.get("plan", b""),
        tasks=tuple(_task(row) for row in tasks),
        updates=tuple(_update(row) for row in updates),
        published=tuple(
            PublishedEvidence(_bytes(blob), _bytes(manifest), _bytes(exact), bool(kept))
            for blob, manifest, exact, kept in published
        ),
        links=tuple(Link(number, _bytes(packed), _bytes(signature)) for number, packed, signature in links),
        site_keys=tuple((_text(site), _bytes(key)) for site, key in keys),
        downloads=tuple(
            Download(_text(site), _bytes(blob), _number(first), _number(last), _whole(size))
            for site, blob, first, last, size in downloads
        ),
    )


def _made_otherwise(db: sqlite3.Connection) -> list[str]:
    """Return the tables and triggers that are not those of a new ledger."""
    query = "select name, sql from sqlite_schema where sql is not null"
    with closing(sqlite3.connect(":memory:")) as new:
        new.executescript(SCHEMA)
        return sorted({_text(name) for name, _ in {*db.execute(query)} ^ {*new.execute(query)}})


def _task(row: Row) -> TaskEvidence:
    number, task, packed, signature, opened, closed, outcome, reason, result = row
    return TaskEvidence(
        number=_whole(number),
        task=_bytes(task),
        packed=_bytes(packed),
        signature=_bytes(signature),
        opened=_number(opened),
        closed=_number(closed),
        outcome=_text(outcome),
        reason=_text(reason),
        result=_bytes(result),
    )


def _update(row: Row) -> UpdateEvidence:
    upload, task, site, packed, signature, stored, counted, kept = row
    return UpdateEvidence(
        upload=_bytes(upload),
        task=_bytes(task),
        site=_text(site),
        packed=_bytes(packed),
        signature=_bytes(signature),
        stored=_number(stored),
        counted=bool(counted),
        kept=bool(kept),
    )


def _bytes(value: Cell) -> bytes:
    return value if isinstance(value, bytes) else b"" if value is None else str(value).encode()


def _text(value: Cell) -> str:
    return "" if value is None else str(value)


def _whole(value: Cell) -> int:
    return value if isinstance(value, int) else 0


def _number(value: Cell) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
