"""The chain of round records: what the coordinator signs when an exchange closes, and how it is checked.

Each record names the SHA-256 of the one before it, so whoever trusts the last trusts all: no round can be
altered, left out, put in or moved without breaking the chain. Only the end can be cut off unseen; whoever
noted the last record's hash (`verify` prints it) notices that too.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from typing import Literal, Self, TypeAlias, cast, get_args

import msgpack

from fedoap.errors import ChainError
from fedoap.identity import ROUND_CONTEXT, is_signed
from fedoap.manifests import HASH_BYTES, TaskKind

RECORD_VERSION = 1
Outcome: TypeAlias = Literal["done", "abandoned", "unattended"]
"""`abandoned`: the attempt failed. `unattended`: nothing failed, but sites that were needed fell silent."""
NO_RECORD = bytes(HASH_BYTES)
"""Stands before the first record."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """A committed upload and how much it counted; `stored` is Unix time in seconds."""

    site: str
    upload: bytes
    cases: int
    weight: float
    stored: float


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One exchange that is over; ids are empty where there is no such blob, times are Unix seconds."""

    federation: str
    number: int
    """1 for the first exchange that closed, and so on without a gap."""
    previous: bytes
    """SHA-256 of the packed record before this one."""
    task: bytes
    kind: TaskKind
    round: int
    attempt: int
    plan: bytes
    model: bytes
    bank: bytes
    opened: float
    closed: float
    outcome: Outcome
    reason: str
    rule: str
    """How the uploads became the result."""
    counted: tuple[Weighed, ...]
    left_out: tuple[Weighed, ...]
    """Uploads that were committed and did not count."""
    result: bytes
    exact: bytes
    """The result's float32 original, where it was rounded for the wire."""
    software: str

    @property
    def id(self) -> bytes:
        """What the next record calls this one."""
        return record_id(self.pack())

    def pack(self) -> bytes:
        """Return the canonical bytes."""
        return _pack({"v": RECORD_VERSION} | {one.name: _plain(getattr(self, one.name)) for one in fields(self)})

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the record that `pack` wrote.

        Raises:
            ChainError: it has another form.
        """
        match _unpack(data):
            case {
                "v": 1,
                "federation": str(federation),
                "number": int(number),
                "previous": bytes(previous),
                "task": bytes(task),
                "kind": str(kind),
                "round": int(round_number),
                "attempt": int(attempt),
                "plan": bytes(plan),
                "model": bytes(model),
                "bank": bytes(bank),
                "opened": float(opened),
                "closed": float(closed),
                "outcome": str(outcome),
                "reason": str(reason),
                "rule": str(rule),
                "counted": list(counted),
                "left_out": list(left_out),
                "result": bytes(result),
                "exact": bytes(exact),
                "software": str(software),
            } if kind in get_args(TaskKind) and outcome in get_args(Outcome):
                record = cls(
                    federation=federation,
                    number=number,
                    previous=previous,
                    task=task,
                    kind=cast(TaskKind, kind),
                    round=round_number,
                    attempt=attempt,
                    plan=plan,
                    model=model,
                    bank=bank,
                    opened=opened,
                    closed=closed,
                    outcome=cast(Outcome, outcome),
                    reason=reason,
                    rule=rule,
                    counted=tuple(map(_weighed, counted)),
                    left_out=tuple(map(_weighed, left_out)),
                    result=result,
                    exact=exact,
                    software=software,
                )
            case _:
                raise ChainError("record: keys or types are not those of version 1")
        if record.pack() != data:
            raise ChainError("record: its bytes are not the canonical ones")
        return record


@dataclass(frozen=True, slots=True)
class Link:
    """A record as it lies in the ledger; `number` is the row's."""

    number: int
    packed: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class CheckedLink:
    """What became of one link: its record unless it cannot be read, and what is wrong with it."""

    number: int
    record: RoundRecord | None
    faults: tuple[str, ...]


def record_id(packed: bytes) -> bytes:
    """Return the name of a packed record."""
    return hashlib.sha256(packed).digest()


def check_chain(links: Iterable[Link], federation: str, key: bytes) -> Iterator[CheckedLink]:
    """Yield what each link is worth, in order, held against the federation's public signing key.

    A link is not blamed for naming one before it that is itself damaged.
    """
    number, previous = 0, NO_RECORD
    is_sound = True
    for link in links:
        faults = []
        if link.number != number + 1:
            missing = "the first" if number == 0 else f"what follows record {number}"
            faults.append(f"record {link.number} stands where {missing} should")
        is_signed_here = is_signed(key, link.signature, ROUND_CONTEXT, link.packed)
        if not is_signed_here:
            faults.append(f"record {link.number} is not signed by the federation's key")
        record = _read(link, faults)
        if record is not None and is_signed_here:
            faults += _misplaced(record, link, federation, previous if is_sound else record.previous)
        yield CheckedLink(link.number, record, tuple(faults))
        number, previous, is_sound = link.number, record_id(link.packed), is_signed_here


def _read(link: Link, faults: list[str]) -> RoundRecord | None:
    try:
        return RoundRecord.unpack(link.packed)
    except ChainError as error:
        faults.append(f"record {link.number}: {error}")
        return None


def _misplaced(record: RoundRecord, link: Link, federation: str, previous: bytes) -> Iterator[str]:
    if record.number != link.number:
        yield f"record {link.number} was signed as record {record.number}"
    if record.federation != federation:
        yield f"record {link.number} is of federation {record.federation}, not of {federation}"
    if record.previous != previous:
        yield f"record {link.number} does not follow the record before it: their hashes differ"


def _plain(value: object) -> object:
    return [list(astuple(one)) for one in value] if isinstance(value, tuple) else value


def _weighed(row: object) -> Weighed:
    match row:
        case [str(site), bytes(upload), int(cases), float(weight), float(stored)]:
            return Weighed(site, upload, cases, weight, stored)
    raise ChainError("record: an upload's row must be [site, upload, cases, weight, stored]")


def _pack(value: object) -> bytes:
    return msgpack.packb(value, use_bin_type=True)  # type: ignore[no-any-return]


def _unpack(data: bytes) -> object:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ChainError(f"record: not msgpack of the allowed form: {type(error).__name__}") from None
