"""The ledger: what the coordinator must never forget, in one SQLite file.

Rows are small; tensors lie in files (`blobs.py`). Every public method that writes is one
transaction that is on the disk when the method returns (WAL, synchronous=FULL). The daemon and the
command line open the same file at the same time; `version` tells the one of the other's changes.
`kept` says whether a blob is still wanted on disk: it only ever falls, and files are deleted after it fell.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from fedoap.chain import NO_RECORD, record_id
from fedoap.errors import ConfigError, StorageError
from fedoap.identity import Member, Roster
from fedoap.manifests import BlobManifest, UploadManifest
from fedoap.protocol.events import RecordClosed
from fedoap_coordinator import rows
from fedoap_coordinator.damage import ledger_error, told, told_whole
from fedoap_coordinator.notary import Closing, Committed, Sign
from fedoap_coordinator.rows import Cell, Download, Invite, PartRow, TaskRow, UpdateRow

SCHEMA_VERSION = 2
SCHEMA = """
create table if not exists facts(name text primary key, value blob not null);
create table if not exists members(
  site text primary key, curve_key blob not null unique, signing_key blob not null unique,
  enrolled real not null, revoked real);
create table if not exists site_keys(signing_key blob primary key, site text not null, since real not null);
create trigger if not exists key_of_new_member after insert on members begin
  insert or ignore into site_keys values(new.signing_key, new.site, new.enrolled); end;
create trigger if not exists key_of_changed_member after update of signing_key on members begin
  insert or ignore into site_keys values(new.signing_key, new.site, new.enrolled); end;
create table if not exists invites(
  token_key blob primary key, site text not null, created real not null, expires integer not null,
  used real, withdrawn real);
create table if not exists tasks(
  number integer primary key, task blob not null unique, packed blob not null, signature blob not null,
  opened real not null, closed real, outcome text, reason text not null default '', result blob);
create table if not exists updates(
  upload blob primary key, task blob not null references tasks(task), site text not null,
  packed blob not null, signature blob not null, stored real not null,
  counted integer not null default 0, kept integer not null default 1, unique(task, site));
create table if not exists parts(
  upload blob primary key, site text not null, packed blob not null, signature blob not null, at integer not null);
create table if not exists published(
  blob blob primary key, manifest blob not null, exact blob, made real not null, kept integer not null default 1);
create table if not exists downloads(
  site text not null, blob blob not null, first real not null, last real not null, bytes integer not null,
  primary key(site, blob));
create table if not exists records(number integer primary key, packed blob not null, signature blob not null);
"""
BUSY_SECONDS = 10.0


class Ledger:
    """The open ledger of one federation."""

    def __init__(self, path: Path, federation: str) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=full")
            if check_version(self._db, path) == 0:
                self._db.executescript(f"begin immediate;{SCHEMA}pragma user_version={SCHEMA_VERSION};commit;")
        except sqlite3.Error as error:
            raise ledger_error(path, error) from None
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

    @told_whole
    def fact(self, name: str) -> bytes | None:
        """Return a named value, or nothing."""
        return next(iter(rows.blobs(self._run("select value from facts where name=?", name))), None)

    def set_fact(self, name: str, value: bytes) -> None:
        """Set a named value."""
        self._run("insert or replace into facts values(?,?)", name, value)

    def claim(self, name: str, value: bytes) -> None:
        """Set a named value unless it is set."""
        self._run("insert or ignore into facts values(?,?)", name, value)

    # Who is who.

    @told_whole
    def roster(self) -> Roster:
        """Return all sites that ever enrolled."""
        found = self._run("select site, curve_key, signing_key, revoked is not null from members order by site")
        return Roster(self._epoch(), tuple(map(rows.member, found)))

    @told_whole
    def invites(self) -> tuple[Invite, ...]:
        """Return all tokens ever given out, oldest first."""
        columns = "token_key, site, expires, used is not null, withdrawn is not null"
        found = self._run(f"select {columns} from invites order by created, rowid")  # noqa: S608 - our own words
        return tuple(map(rows.invite, found))

    def add_invite(self, token_key: bytes, site: str, now: float, expires: int) -> None:
        """Record a new token; the site's earlier ones that were not used are withdrawn."""
        with self._transaction():
            self._run("update invites set withdrawn=? where site=? and used is null", now, site)
            self._run("insert into invites values(?,?,?,?,null,null)", token_key, site, now, expires)

    def enrol(self, token_key: bytes, member: Member, now: float) -> bool:
        """Record a member under the token, which is used up from now on; return whether it was good until now."""
        with self._transaction():
            is_void = "token_key=? and (used is not null or withdrawn is not null)"
            if self._run(f"select 1 from invites where {is_void}", token_key).fetchall():  # noqa: S608 - our own words
                return False
            self._run("update invites set used=? where token_key=?", now, token_key)
            row = (member.name, member.curve_key, member.signing_key, now)
            self._run("insert or replace into members values(?,?,?,?,null)", *row)
            self._next_epoch()
        return True

    def rotate(self, old: Member, new: Member, now: float) -> bool:
        """Replace a member's keys; return whether it was a member, with these old keys, until now."""
        with self._transaction():
            where = (old.name, old.curve_key, old.signing_key)
            is_member = "site=? and curve_key=? and signing_key=? and revoked is null"
            if not self._run(f"select 1 from members where {is_member}", *where).fetchall():  # noqa: S608 - our own words
                return False
            row = (new.curve_key, new.signing_key, now, old.name)
            self._run("update members set curve_key=?, signing_key=?, enrolled=? where site=?", *row)
            self._next_epoch()
        return True

    @told_whole
    def count_keys(self, site: str, since: float) -> int:
        """Return how many signing keys a site has been given since then."""
        ((count,),) = self._run("select count(*) from site_keys where site=? and since>=?", site, since)
        return int(count)

    def revoke(self, site: str, now: float) -> bool:
        """Withdraw a site's membership and its open tokens; return whether there was anything to withdraw."""
        with self._transaction():
            tokens = self._run("update invites set withdrawn=? where site=? and used is null", now, site).rowcount
            members = self._run("update members set revoked=? where site=? and revoked is null", now, site).rowcount
            if members:
                self.set_fact(f"revoked {site}", repr(now).encode())  # outlasts that the site joins anew
            self._next_epoch()
        return tokens + members > 0

    @told_whole
    def revoked_at(self, site: str) -> float | None:
        """Return when a key of the site was revoked last, though it may have joined anew since; None if never."""
        at = self.fact(f"revoked {site}")
        return None if at is None else rows.number(at, f"revoked {site}")

    # Exchanges.

    def open_task(self, task: bytes, packed: bytes, signature: bytes, now: float) -> None:
        """Record that a task is announced; recording it twice is the same as once."""
        columns = "task, packed, signature, opened"
        self._run(f"insert or ignore into tasks({columns}) values(?,?,?,?)", task, packed, signature, now)

    def add_update(self, upload: bytes, site: str, manifest: UploadManifest, signature: bytes, now: float) -> None:
        """Record a committed upload; recording it twice is the same as once."""
        row = (upload, manifest.task, site, manifest.pack(), signature, now)
        self._run("insert or ignore into updates values(?,?,?,?,?,?,0,1)", *row)

    def record_part(self, upload: bytes, site: str, manifest: UploadManifest, signature: bytes, at: int) -> None:
        """Record how far an upload under way is durable."""
        row = (upload, site, manifest.pack(), signature, at)
        self._run("insert into parts values(?,?,?,?,?) on conflict(upload) do update set at=excluded.at", *row)

    def forget_part(self, upload: bytes) -> None:
        """Record that nothing of an upload under way can be relied on; there need not be any."""
        self._run("delete from parts where upload=?", upload)

    @told_whole
    def parts(self) -> tuple[PartRow, ...]:
        """Return the uploads that are durable in part, by site."""
        found = self._run("select upload, site, packed, signature, at from parts order by site, upload")
        return tuple(map(rows.part, found))

    def publish(self, manifest: BlobManifest, now: float, exact: BlobManifest | None = None) -> None:
        """Record a model or a bank that the coordinator made, and what it keeps of it to itself, if anything."""
        row = (manifest.id, manifest.pack(), exact.pack() if exact else None, now)
        again = "on conflict(blob) do update set kept=1, exact=excluded.exact"  # the same bits may be made twice
        self._run(f"insert into published values(?,?,?,?,1) {again}", *row)

    def close_task(self, closed: RecordClosed, now: float, sign: Sign) -> None:
        """Record how a task ended and which uploads counted, and add its signed record to the chain."""
        result = closed.result.id if closed.result else None
        with self._transaction():
            values = (now, closed.outcome, closed.reason, result, closed.task)
            self._run("update tasks set closed=?, outcome=?, reason=?, result=? where task=?", *values)
            for upload in closed.counted:
                self._run("update updates set counted=1 where upload=?", upload)
            record, signature = sign(self._closing(closed.task), *self._next_record())
            self._run("insert into records values(?,?,?)", record.number, record.pack(), signature)

    def add_downloads(self, downloads: Iterable[Download]) -> None:
        """Add to what left for sites."""
        again = "on conflict(site, blob) do update set last=excluded.last, bytes=bytes+excluded.bytes"
        with self._transaction():
            for one in downloads:
                row = (one.site, one.blob, one.first, one.last, one.bytes)
                self._run(f"insert into downloads values(?,?,?,?,?) {again}", *row)

    @told_whole
    def keep_only(self, uploads: Set[bytes], published: Set[bytes]) -> None:
        """Record that no other upload's or result's tensors are wanted on disk any more."""
        with self._transaction():
            for (upload,) in self._run("select upload from updates where kept").fetchall():
                if upload not in uploads:
                    self._run("update updates set kept=0 where upload=?", upload)
            for (blob,) in self._run("select blob from published where kept").fetchall():
                if blob not in published:
                    self._run("update published set kept=0 where blob=?", blob)

    @told_whole
    def kept(self) -> frozenset[bytes]:
        """Return the uploads, and the blobs of results, that must be on the disk."""
        uploads = self._run("select upload from updates where kept")
        published = self._run("select blob from published where kept")
        return frozenset(rows.blobs((*uploads, *published)))

    @told_whole
    def tasks(self) -> tuple[TaskRow, ...]:
        """Return all exchanges in the order in which they were opened."""
        return self._tasks("order by number")

    @told_whole
    def updates(self, task: bytes) -> tuple[UpdateRow, ...]:
        """Return a task's committed uploads by site."""
        columns = "site, upload, packed, counted, stored, kept"
        found = self._run(f"select {columns} from updates where task=? order by site", task)  # noqa: S608 - likewise
        return tuple(map(rows.update, found))

    @told_whole
    def published(self, blob: bytes) -> BlobManifest | None:
        """Return the manifest of a model or bank that the coordinator made."""
        packed = rows.blobs(self._run("select manifest from published where blob=?", blob))
        return next(map(BlobManifest.unpack, packed), None)

    def _tasks(self, which: str, *values: Cell) -> tuple[TaskRow, ...]:
        columns = "task, packed, signature, opened, closed, outcome, reason, result"
        return tuple(map(rows.task, self._run(f"select {columns} from tasks {which}", *values)))  # noqa: S608 - likewise

    @told_whole
    def _closing(self, task: bytes) -> Closing:
        (row,) = self._tasks("where task=?", task)
        assert row.closed is not None
        assert row.outcome is not None
        uploads = tuple(Committed(one.upload, one.manifest, one.stored, one.counted) for one in self.updates(task))
        query = "select exact from published where blob=? and exact is not null"
        exact = next(map(BlobManifest.unpack, rows.blobs(self._run(query, row.result))), None)
        return Closing(
            task=task,
            manifest=row.manifest,
            opened=row.opened,
            closed=row.closed,
            outcome=row.outcome,
            reason=row.reason,
            uploads=uploads,
            result=row.result or b"",
            exact=exact.id if exact else b"",
        )

    @told_whole
    def _next_record(self) -> tuple[int, bytes]:
        """Return the number that comes next and the id of the record before it."""
        ((count,),) = self._run("select ifnull(max(number), 0) from records")
        last = rows.blobs(self._run("select packed from records where number=?", count))
        return int(count) + 1, next(map(record_id, last), NO_RECORD)

    def _epoch(self) -> int:
        return int(rows.number(self.fact("epoch") or b"0", "epoch"))

    @told_whole
    def _next_epoch(self) -> None:
        self.set_fact("epoch", str(self._epoch() + 1).encode())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._run("begin immediate")
        try:
            yield
            self._run("commit")
        except BaseException:
            self._db.rollback()
            raise

    def _run(self, sql: str, *values: Cell) -> sqlite3.Cursor:
        with told(self.path):
            return self._db.execute(sql, values)


def check_version(db: sqlite3.Connection, path: Path) -> int:
    """Return the version of a ledger that this software reads, 0 if it is still empty.

    Raises:
        StorageError: it is one of another version.
    """
    ((version,),) = db.execute("pragma user_version")
    ((tables,),) = db.execute("select count(*) from sqlite_schema")
    if tables and version != SCHEMA_VERSION:
        raise StorageError(
            f"{path}: ledger has version {version}, but this software reads version {SCHEMA_VERSION}: "
            "go on with the software that made it, or name another coordinator.state for a new run"
        )
    return int(version)
