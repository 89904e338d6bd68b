"""The closed set of wire messages and their codec.

A message is two frames behind ZeroMQ's routing frame: a msgpack map of at most `MAX_HEADER_BYTES`
and a raw body of at most `MAX_BODY_BYTES`. Each class below is one type of message; its fields are
the header's only keys, and their annotations say what values are let through. Anything else (an
unknown key, another type, a number out of range, a body where none belongs) is a `MessageError`.

Every message has an answer and none relies on being delivered: a site repeats what it asked until
the answer comes, and the coordinator answers the same question twice in the same way.
"""

import dataclasses
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias, get_args, get_type_hints

import msgpack

from fedoap.bounds import Check, Length, Range, check, rule
from fedoap.errors import MessageError

PROTOCOL_VERSION = 2
CHUNK_BYTES = 1 << 20
"""Largest piece of a blob in one message: the knee of ZeroMQ's throughput."""
MAX_HEADER_BYTES = 4096
MAX_BODY_BYTES = CHUNK_BYTES + 16
"""A chunk and the tag of its seal."""
MAX_MESSAGE_BYTES = MAX_BODY_BYTES + MAX_HEADER_BYTES


Hash: TypeAlias = Annotated[bytes, Length(32, 32)]
Key: TypeAlias = Annotated[bytes, Length(32, 32)]
Signature: TypeAlias = Annotated[bytes, Length(64, 64)]
Text: TypeAlias = Annotated[str, Length(0, 500)]
Word: TypeAlias = Annotated[str, Length(1, 64)]
Offset: TypeAlias = Annotated[int, Range(0, 2**48)]
Count: TypeAlias = Annotated[int, Range(0, 2**31)]
Value: TypeAlias = Annotated[float, Range(-1e30, 1e30)]

RefusalCode: TypeAlias = Literal[
    "malformed", "version", "plan", "unknown_site", "revoked", "not_joined", "bad_signature", "token", "exists",
    "unknown_task", "late", "foreign", "duplicate", "schema", "base_model", "not_finite", "corrupt", "no_space",
    "no_blob", "superseded", "cases", "stopping", "too_often",
]  # fmt: skip
"""`late`: its exchange is closed. `foreign`: not of this site's cohort. `duplicate`: another upload is recorded."""


class _Message:
    """What all messages share."""

    __slots__ = ()
    type: ClassVar[str]
    max_body: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class Open(_Message):
    """First word on a connection; answered by `Challenge` or `Refuse`."""

    type: ClassVar[str] = "open"
    protocol: Count
    software: Word


@dataclass(frozen=True, slots=True)
class Hello(_Message):
    """Who speaks: signs `hello_bytes` of the challenge; answered by `Welcome` or `Refuse`."""

    type: ClassVar[str] = "hello"
    nonce: Hash
    signature: Signature


@dataclass(frozen=True, slots=True)
class Enrol(_Message):
    """A new site's public keys, sent under the key derived from its token; answered by `Enrolled` or `Refuse`."""

    type: ClassVar[str] = "enrol"
    protocol: Count
    site: Word
    curve_key: Key
    signing_key: Key
    signature: Signature


@dataclass(frozen=True, slots=True)
class Rotate(_Message):
    """New public keys of a site; signs `rotate_payload` by the old and the new one; answered as `Enrol` is."""

    type: ClassVar[str] = "rotate"
    protocol: Count
    curve_key: Key
    signing_key: Key
    signature: Signature
    """By the signing key that is enrolled."""
    proof: Signature
    """By the new signing key: it is whose it claims to be."""


@dataclass(frozen=True, slots=True)
class Sync(_Message):
    """What is due? Asked at intervals: answered by `Task`, `Proceed` or `Idle`."""

    type: ClassVar[str] = "sync"
    task: Annotated[bytes, Length(0, 32)]
    """The task in hand, or nothing."""


@dataclass(frozen=True, slots=True)
class Progress(_Message):
    """How far training is; for the operator's eyes, answered by nothing, lost without harm."""

    type: ClassVar[str] = "progress"
    task: Hash
    stage: Word
    step: Count
    steps: Count
    loss: Value
    dice: Value
    """Mean validation Dice, or -1 while there is none."""


@dataclass(frozen=True, slots=True)
class Get(_Message):
    """Asks for bytes [at, upto) of a blob; answered by `Data` for each chunk, or `Refuse`."""

    type: ClassVar[str] = "get"
    blob: Hash
    at: Offset
    upto: Offset


@dataclass(frozen=True, slots=True)
class Offer(_Message):
    """A finished task's result: body is the packed `UploadManifest`; answered by `Go`, `Wait`, `Commit`, `Refuse`."""

    type: ClassVar[str] = "offer"
    max_body: ClassVar[int] = MAX_BODY_BYTES
    upload: Hash
    """SHA-256 of the body."""
    signature: Signature
    """Ed25519 of the site over `fedoap.identity.UPLOAD_CONTEXT` + body."""


@dataclass(frozen=True, slots=True)
class Chunk(_Message):
    """One sealed chunk of an upload; answered by `Credit` now and then, by `Commit` after the last, or `Refuse`."""

    type: ClassVar[str] = "chunk"
    max_body: ClassVar[int] = MAX_BODY_BYTES
    upload: Hash
    at: Offset


@dataclass(frozen=True, slots=True)
class Failed(_Message):
    """The site cannot do this task; answered by `Ack`."""

    type: ClassVar[str] = "failed"
    task: Hash
    reason: Text


@dataclass(frozen=True, slots=True)
class Bye(_Message):
    """The site leaves in good order; answered by nothing."""

    type: ClassVar[str] = "bye"


@dataclass(frozen=True, slots=True)
class Challenge(_Message):
    """Fresh random bytes to sign, and the coordinator's clock for whoever wants to compare."""

    type: ClassVar[str] = "challenge"
    protocol: Count
    software: Word
    nonce: Hash
    time: Offset = 0
    """Unix seconds, or 0 where it is not told."""


@dataclass(frozen=True, slots=True)
class Welcome(_Message):
    """The site is in; body is the plan's JSON."""

    type: ClassVar[str] = "welcome"
    max_body: ClassVar[int] = MAX_BODY_BYTES
    site: Word
    plan: Hash


@dataclass(frozen=True, slots=True)
class Enrolled(_Message):
    """The site's keys are recorded; body is its certificate (`fedoap.identity.Certificate`)."""

    type: ClassVar[str] = "enrolled"
    max_body: ClassVar[int] = MAX_HEADER_BYTES
    site: Word


@dataclass(frozen=True, slots=True)
class Task(_Message):
    """Something to do: body is the packed `TaskManifest`, signed by the federation."""

    type: ClassVar[str] = "task"
    max_body: ClassVar[int] = MAX_BODY_BYTES
    task: Hash
    """SHA-256 of the body."""
    signature: Signature
    """Ed25519 of the federation over `fedoap.identity.TASK_CONTEXT` + body."""


@dataclass(frozen=True, slots=True)
class Proceed(_Message):
    """The task that the site named is still due: go on."""

    type: ClassVar[str] = "proceed"
    task: Hash


@dataclass(frozen=True, slots=True)
class Idle(_Message):
    """Nothing is due now; `reason` says for whom or what the coordinator waits."""

    type: ClassVar[str] = "idle"
    state: Literal["waiting", "finished", "stopped"]
    reason: Text


@dataclass(frozen=True, slots=True)
class Go(_Message):
    """Send the upload's bytes from `at`, up to `upto`."""

    type: ClassVar[str] = "go"
    upload: Hash
    at: Offset
    upto: Offset


@dataclass(frozen=True, slots=True)
class Wait(_Message):
    """The upload is admitted but others are ahead: offer again later."""

    type: ClassVar[str] = "wait"
    upload: Hash


@dataclass(frozen=True, slots=True)
class Credit(_Message):
    """Bytes up to `upto` may be sent; absolute, so a repeated or late credit does no harm."""

    type: ClassVar[str] = "credit"
    upload: Hash
    upto: Offset


@dataclass(frozen=True, slots=True)
class Commit(_Message):
    """The upload is on the coordinator's disk for good."""

    type: ClassVar[str] = "commit"
    upload: Hash


@dataclass(frozen=True, slots=True)
class Data(_Message):
    """One chunk of a blob, body raw."""

    type: ClassVar[str] = "data"
    max_body: ClassVar[int] = MAX_BODY_BYTES
    blob: Hash
    at: Offset


@dataclass(frozen=True, slots=True)
class Ack(_Message):
    """A `Failed` was noted."""

    type: ClassVar[str] = "ack"
    task: Hash


@dataclass(frozen=True, slots=True)
class Refuse(_Message):
    """No, and why; `about` is the hash of the upload, task or blob meant, or nothing."""

    type: ClassVar[str] = "refuse"
    code: RefusalCode
    reason: Text
    about: Annotated[bytes, Length(0, 32)] = b""


FromSite: TypeAlias = Open | Hello | Enrol | Rotate | Sync | Progress | Get | Offer | Chunk | Failed | Bye
FromCoordinator: TypeAlias = (
    Challenge | Welcome | Enrolled | Task | Proceed | Idle | Go | Wait | Credit | Commit | Data | Ack | Refuse
)
Message: TypeAlias = FromSite | FromCoordinator


def encode(message: Message) -> bytes:
    """Return the header frame of a message; a space stands for what a text holds that cannot be printed."""
    kind = type(message)
    header = {"t": kind.type} | {name: _printable(getattr(message, name)) for name in _FIELDS[kind]}
    return msgpack.packb(header, use_bin_type=True)  # type: ignore[no-any-return]


def decode_from_site(header: bytes | memoryview, body_bytes: int) -> FromSite:
    """Return the message that a site sent with a body of `body_bytes`.

    Raises:
        MessageError: naming the first thing that is wrong.
    """
    return _decode(header, body_bytes, _FROM_SITE)  # type: ignore[return-value]


def decode_from_coordinator(header: bytes | memoryview, body_bytes: int) -> FromCoordinator:
    """Return the message that the coordinator sent with a body of `body_bytes`.

    Raises:
        MessageError: naming the first thing that is wrong.
    """
    return _decode(header, body_bytes, _FROM_COORDINATOR)  # type: ignore[return-value]


def _printable(value: object) -> object:
    if isinstance(value, str) and not value.isprintable():
        return "".join(letter if letter.isprintable() else " " for letter in value)
    return value


def _decode(header: bytes | memoryview, body_bytes: int, kinds: "dict[str, _Kind]") -> Message:
    values = _unpack(header)
    name = values.pop("t", None)
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise MessageError(f"message type is {repr(name)[:60]}, which is not one of {', '.join(kinds)}")
    if body_bytes > kind.max_body:
        raise MessageError(f"{name}: body is {body_bytes} bytes, but at most {kind.max_body} are allowed")
    if values.keys() != kind.checks.keys():
        odd = sorted(repr(key)[:40] for key in values.keys() ^ kind.checks.keys())
        raise MessageError(f"{name}: keys {', '.join(odd)} are missing or unknown")
    for key, wanted in kind.checks.items():
        check(f"{name}.{key}", values[key], wanted)
    return kind.make(**values)


def _unpack(header: bytes | memoryview) -> dict[str, object]:
    if len(header) > MAX_HEADER_BYTES:
        raise MessageError(f"header is {len(header)} bytes, but at most {MAX_HEADER_BYTES} are allowed")
    try:
        values = msgpack.unpackb(
            header, raw=False, strict_map_key=True, max_ext_len=0, max_array_len=0, max_map_len=16, max_str_len=1024
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError(f"header is not msgpack of the allowed form: {type(error).__name__}") from None
    if not isinstance(values, dict):
        raise MessageError(f"header is a {type(values).__name__}, but must be a map")
    return values


@dataclass(frozen=True, slots=True)
class _Kind:
    make: Callable[..., Message]
    max_body: int
    checks: dict[str, Check]


def _table(union: types.UnionType) -> dict[str, _Kind]:
    return {cls.type: _Kind(cls, cls.max_body, _checks(cls)) for cls in get_args(union)}


def _checks(cls: type[Message]) -> dict[str, Check]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: rule(hints[field.name]) for field in dataclasses.fields(cls)}


_FROM_SITE = _table(FromSite)
_FROM_COORDINATOR = _table(FromCoordinator)
_FIELDS = {kind.make: tuple(kind.checks) for table in (_FROM_SITE, _FROM_COORDINATOR) for kind in table.values()}
