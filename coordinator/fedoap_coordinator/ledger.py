"""The ledger: what the coordinator must never forget, in one SQLite file.

Rows are small; tensors lie in files (`blobs.py`). Every public method that writes is one
transaction that is on the disk when the method returns (WAL, synchronous=FULL). The daemon and the
command line open the same file at the same time; `version` tells the one of the other's changes.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

from fedoap.errors import ConfigError, StorageError
from fedoap.identity import Member, Roster
from fedoap.protocol.events import RecordClosed
from fedoap.tensors import BlobManifest, TaskManifest, UploadManifest

SCHEMA = """
create table if not exists facts(name text primary key, value blob not null);
create table if not exists members(
  site text primary key, curve_key blob not null unique, signing_key blob not null unique,
  enrolled real not null, revoked real);
create table if not exists invites(
  token_key blob primary key, site text not null, created real not null, expires integer not null,
  used real, withdrawn real);
create table if not exists tasks(
  number integer primary key, task blob not null unique, packed blob not null, signature blob not null,
  opened real not null, closed real, outcome text, reason text not null default '', result blob);
create table if not exists updates(
  upload blob primary key, task blob not null references tasks(task), site text not null,
  packed blob not null, signature blob not null, stored real not null,
  counted integer not null default 0, unique(task, site));
create table if not exists parts(
  upload blob primary key, site text not null, packed blob not null, signature blob not null, at integer not null);
create table if not exists published(blob blob primary key, manifest blob not null, made real not null);
"""
BUSY_SECONDS = 10.0
Value: TypeAlias = str | bytes | int | float | None
Outcome: TypeAlias = Literal["done", "abandoned"]


@dataclass(frozen=True, slots=True)
class Invite:
    """A token that was given out: the public half of its key, for whom, and what became of it."""

    token_key: bytes
    site: str
    expires: int
    used: bool
    withdrawn: bool


@dataclass(frozen=True, slots=True)
class UpdateRow:
    """A committed upload and whether it counted."""

    site: str
    upload: bytes
    manifest: UploadManifest
    counted: bool


@dataclass(frozen=True, slots=True)
class PartRow:
    """An upload under way, which is durable as far as byte `at`."""

    upload: bytes
    site: str
    manifest: UploadManifest
    signature: bytes
    at: int


@dataclass(frozen=True, slots=True)
class TaskRow:
    """An exchange: its signed manifest, and how it ended if it did; times are Unix seconds."""

    task: bytes
    manifest: TaskManifest
    packed: bytes
    signature: bytes
    opened: float
    closed: float | None
    outcome: Outcome | None
    reason: str
    result: bytes | None
    """Name of the published blob, if the exchange made one."""


class Ledger:
    """The open ledger of one federation."""

    def __init__(self, path: Path, federation: str) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=full")
            self._db.executescript(f"begin immediate;{SCHEMA}commit;")
        except sqlite3.Error as error:
            raise StorageError(f"{path}: ledger cannot be opened: {error}") from None
        self.claim("federation", federation.encode())
        owner = self.fact("federation")
        if owner != federation.encode():
            raise ConfigError(f"{path}: belongs to federation {(owner or b'').decode()}, not to {federation}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @property
    def version(self) -> int:
        """A number that changes whenever another process wrote."""
        for (number,) in self._run("pragma data_version"):
            return int(number)
        raise StorageError(f"{self.path}: ledger has no version")

    def fact(self, name: str) -> bytes | None:
        """Return a named value, or nothing."""
        for (value,) in self._run("select value from facts where name=?", name):
            return bytes(value)
        return None

    def set_fact(self, name: str, value: bytes) -> None:
        """Set a named value."""
        self._run("insert or replace into facts values(?,?)", name, value)

    def claim(self, name: str, value: bytes) -> None:
        """Set a named value unless it is set."""
        self._run("insert or ignore into facts values(?,?)", name, value)

    # Who is who.

    def roster(self) -> Roster:
        """Return all sites that ever enrolled."""
        rows = self._run("select site, curve_key, signing_key, revoked is not null from members order by site")
        members = tuple(Member(site, curve, signing, bool(revoked)) for site, curve, signing, revoked in rows)
        return Roster(int(self.fact("epoch") or b"0"), members)

    def invites(self) -> tuple[Invite, ...]:
        """Return all tokens ever given out, oldest first."""
        columns = "token_key, site, expires, used is not null, withdrawn is not null"
        rows = self._run(f"select {columns} from invites order by created, rowid")  # noqa: S608 - our own words
        return tuple(Invite(key, site, expires, bool(used), bool(gone)) for key, site, expires, used, gone in rows)

    def add_invite(self, token_key: bytes, site: str, now: float, expires: int) -> None:
        """Record a new token; the site's earlier ones that were not used are withdrawn."""
        with self._transaction():
            self._run("update invites set withdrawn=? where site=? and used is null", now, site)
            self._run("insert into invites values(?,?,?,?,null,null)", token_key, site, now, expires)

    def enrol(self, token_key: bytes, member: Member, now: float) -> None:
        """Record a member under the token, which is used up from now on."""
        with self._transaction():
            self._run("update invites set used=? where token_key=?", now, token_key)
            row = (member.name, member.curve_key, member.signing_key, now)
            self._run("insert or replace into members values(?,?,?,?,null)", *row)
            self._next_epoch()

    def revoke(self, site: str, now: float) -> bool:
        """Withdraw a site's membership and its open tokens; return whether there was anything to withdraw."""
        with self._transaction():
            tokens = self._run("update invites set withdrawn=? where site=? and used is null", now, site).rowcount
            members = self._run("update members set revoked=? where site=? and revoked is null", now, site).rowcount
            self._next_epoch()
        return tokens + members > 0

    # Exchanges.

    def open_task(self, task: bytes, packed: bytes, signature: bytes, now: float) -> None:
        """Record that a task is announced; recording it twice is the same as once."""
        columns = "task, packed, signature, opened"
        self._run(f"insert or ignore into tasks({columns}) values(?,?,?,?)", task, packed, signature, now)

    def add_update(self, upload: bytes, site: str, manifest: UploadManifest, signature: bytes, now: float) -> None:
        """Record a committed upload; recording it twice is the same as once."""
        row = (upload, manifest.task, site, manifest.pack(), signature, now)
        self._run("insert or ignore into updates values(?,?,?,?,?,?,0)", *row)

    def record_part(self, upload: bytes, site: str, manifest: UploadManifest, signature: bytes, at: int) -> None:
        """Record how far an upload under way is durable."""
        row = (upload, site, manifest.pack(), signature, at)
        self._run("insert into parts values(?,?,?,?,?) on conflict(upload) do update set at=excluded.at", *row)

    def forget_part(self, upload: bytes) -> None:
        """Record that nothing of an upload under way can be relied on; there need not be any."""
        self._run("delete from parts where upload=?", upload)

    def parts(self) -> tuple[PartRow, ...]:
        """Return the uploads that are durable in part, by site."""
        rows = self._run("select upload, site, packed, signature, at from parts order by site, upload")
        return tuple(PartRow(one, site, UploadManifest.unpack(packed), *rest) for one, site, packed, *rest in rows)

    def publish(self, manifest: BlobManifest, now: float) -> None:
        """Record a model or a bank that the coordinator made."""
        self._run("insert or ignore into published values(?,?,?)", manifest.id, manifest.pack(), now)

    def close_task(self, record: RecordClosed, now: float) -> None:
        """Record how a task ended and which uploads counted."""
        result = record.result.id if record.result else None
        with self._transaction():
            values = (now, record.outcome, record.reason, result, record.task)
            self._run("update tasks set closed=?, outcome=?, reason=?, result=? where task=?", *values)
            for upload in record.counted:
                self._run("update updates set counted=1 where upload=?", upload)

    def tasks(self) -> tuple[TaskRow, ...]:
        """Return all exchanges in the order in which they were opened."""
        columns = "task, packed, signature, opened, closed, outcome, reason, result"
        rows = self._run(f"select {columns} from tasks order by number")  # noqa: S608 - our own words
        return tuple(TaskRow(task, TaskManifest.unpack(packed), packed, *rest) for task, packed, *rest in rows)

    def updates(self, task: bytes) -> tuple[UpdateRow, ...]:
        """Return a task's committed uploads by site."""
        rows = self._run("select site, upload, packed, counted from updates where task=? order by site", task)
        return tuple(
            UpdateRow(site, upload, UploadManifest.unpack(packed), bool(n)) for site, upload, packed, n in rows
        )

    def published(self, blob: bytes) -> BlobManifest | None:
        """Return the manifest of a model or bank that the coordinator made."""
        for (packed,) in self._run("select manifest from published where blob=?", blob):
            return BlobManifest.unpack(packed)
        return None

    def _next_epoch(self) -> None:
        epoch = int(self.fact("epoch") or b"0") + 1
        self._run("insert or replace into facts values('epoch',?)", str(epoch).encode())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._run("begin immediate")
        try:
            yield
            self._run("commit")
        except BaseException:
            self._db.rollback()
            raise

    def _run(self, sql: str, *values: Value) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, values)
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: ledger refused: {error}") from None
