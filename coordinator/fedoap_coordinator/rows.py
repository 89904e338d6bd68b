"""The ledger's rows, parsed once: a cell of another type than its column's is damage, told as such.

SQLite gives back what lies in the file, whatever the column's declared type.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias, cast, get_args

from fedoap.chain import Outcome
from fedoap.errors import StorageError
from fedoap.identity import Member
from fedoap.manifests import TaskManifest, UploadManifest

Cell: TypeAlias = str | bytes | int | float | None
Row: TypeAlias = tuple[Cell, ...]


class RowError(StorageError):
    """A row of the ledger makes no sense."""


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
    """A committed upload, whether it counted, and whether its tensors are still kept; `stored` is Unix time."""

    site: str
    upload: bytes
    manifest: UploadManifest
    counted: bool
    stored: float
    kept: bool


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


@dataclass(frozen=True, slots=True)
class Download:
    """Bytes of a published blob that left for a site between two moments (Unix seconds)."""

    site: str
    blob: bytes
    first: float
    last: float
    bytes: int


def member(row: Row) -> Member:
    """Parse site, curve_key, signing_key and whether it is revoked."""
    match row:
        case (str(site), bytes(curve_key), bytes(signing_key), int(revoked)):
            return Member(site, curve_key, signing_key, bool(revoked))
    raise _damaged("members")


def invite(row: Row) -> Invite:
    """Parse token_key, site, expires, and whether it is used and withdrawn."""
    match row:
        case (bytes(token_key), str(site), int(expires), int(used), int(withdrawn)):
            return Invite(token_key, site, expires, bool(used), bool(withdrawn))
    raise _damaged("invites")


def task(row: Row) -> TaskRow:
    """Parse task, packed, signature, opened, closed, outcome, reason and result.

    Raises:
        TensorsError: `packed` is no manifest.
    """
    match row:
        case (
            bytes(name),
            bytes(packed),
            bytes(signature),
            float(opened),
            float() | None as closed,
            outcome,
            str(reason),
            bytes() | None as result,
        ) if outcome is None or outcome in get_args(Outcome):
            ended = cast(Outcome | None, outcome)
            return TaskRow(name, TaskManifest.unpack(packed), packed, signature, opened, closed, ended, reason, result)
    raise _damaged("tasks")


def update(row: Row) -> UpdateRow:
    """Parse site, upload, packed, counted, stored and kept.

    Raises:
        TensorsError: `packed` is no manifest.
    """
    match row:
        case (str(site), bytes(upload), bytes(packed), int(counted), float(stored), int(kept)):
            return UpdateRow(site, upload, UploadManifest.unpack(packed), bool(counted), stored, bool(kept))
    raise _damaged("updates")


def part(row: Row) -> PartRow:
    """Parse upload, site, packed, signature and at, which must be where a chunk of the upload ends.

    Raises:
        TensorsError: `packed` is no manifest.
    """
    match row:
        case (bytes(upload), str(site), bytes(packed), bytes(signature), int(at)):
            manifest = UploadManifest.unpack(packed)
            if 0 < at < manifest.blob.size and at % manifest.blob.chunk_bytes == 0:
                return PartRow(upload, site, manifest, signature, at)
    raise _damaged("parts")


def blobs(rows: Iterable[Row]) -> Iterable[bytes]:
    """Parse rows of one cell each, which holds bytes: a name, or a packed manifest or record."""
    for row in rows:
        match row:
            case (bytes(blob),):
                yield blob
            case _:
                raise _damaged("a table of blobs")


def number(fact: bytes, name: str) -> float:
    """Parse a fact that is a number."""
    try:
        return float(fact)
    except ValueError:
        raise RowError(f"facts.{name} is {fact[:40]!r}, but must be a number") from None


def parsed(fact: bytes, name: str) -> object:
    """Parse a fact that is JSON."""
    try:
        return json.loads(fact)
    except ValueError:
        raise RowError(f"facts.{name} is no JSON") from None


def _damaged(table: str) -> RowError:
    return RowError(f"{table} has a row whose cells do not fit their columns")
