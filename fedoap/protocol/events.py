"""What can happen to a machine, and what it asks of its daemon.

Events come in, effects go out; both are plain values. Blobs are named by `BlobManifest.id`, uploads
by the SHA-256 of their packed `UploadManifest`, tasks by the SHA-256 of their packed `TaskManifest`.
A daemon carries out effects in the order given; what takes long or may fail reports back by an event.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fedoap.chain import Outcome
from fedoap.identity import Roster
from fedoap.manifests import NO_KEY, BlobManifest, TaskManifest, UploadManifest
from fedoap.messages import FromCoordinator, FromSite, RefusalCode


@dataclass(frozen=True, slots=True)
class Received:
    """A well-formed message of the site that owns the connection's key; `route` is a return address only."""

    site: str
    route: bytes
    message: FromSite
    body: bytes | memoryview = b""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A message that the codec refused."""

    site: str
    route: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class RosterChanged:
    """A site joined or was revoked."""

    roster: Roster


@dataclass(frozen=True, slots=True)
class Stored:
    """A `FinishPart` succeeded: the upload is durable."""

    upload: bytes


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """`OpenPart`, `WritePart` or `FinishPart` failed; the part is gone."""

    upload: bytes
    code: Literal["no_space", "corrupt"]
    reason: str


@dataclass(frozen=True, slots=True)
class Aggregated:
    """An `Aggregate` succeeded and its result, if it has one, is a durable blob."""

    task: bytes
    result: BlobManifest | None


@dataclass(frozen=True, slots=True)
class AggregateFailed:
    """An `Aggregate` failed; `site` names the one whose update is to blame, if it is one's."""

    task: bytes
    reason: str
    site: str = ""


@dataclass(frozen=True, slots=True)
class Stopping:
    """The operator asked the daemon to end: say so to the sites."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by."""


CoordinatorEvent: TypeAlias = (
    Received | Malformed | RosterChanged | Stored | StoreFailed | Aggregated | AggregateFailed | Stopping | Tick
)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a return address; a peer that is gone is no error."""

    route: bytes
    message: FromCoordinator
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class SendBlob:
    """Send bytes [at, upto) of a stored blob as `Data`, a chunk each; `upto` is at most the blob's size."""

    route: bytes
    blob: bytes
    at: int
    upto: int


@dataclass(frozen=True, slots=True)
class OpenPart:
    """Make room on disk for a sealed upload or, at a site, a blob; its first `at` bytes are there already."""

    part: bytes
    size: int
    at: int = 0
    blob: BlobManifest | None = None
    """At a site: what the part is to become, to be kept beside it."""


@dataclass(frozen=True, slots=True)
class WritePart:
    """Write a checked chunk at its offset; at the coordinator both are those of the sealed upload."""

    part: bytes
    at: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class SyncPart:
    """Make an upload durable as far as byte `at` of its blob, then write that down: a restart goes on there."""

    part: bytes
    at: int
    upload: UploadManifest
    site: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class FinishPart:
    """Make a complete part durable under the blob's name, record it, then report `Stored` or `BlobStored`."""

    part: bytes
    blob: BlobManifest
    upload: UploadManifest | None = None
    site: str = ""
    signature: bytes = b""


@dataclass(frozen=True, slots=True)
class DropPart:
    """Forget an unfinished part."""

    part: bytes


@dataclass(frozen=True, slots=True)
class Update:
    """A committed upload: whose, what it says, and where its tensors are."""

    site: str
    upload: bytes
    manifest: UploadManifest


@dataclass(frozen=True, slots=True)
class Arriving:
    """An upload that a restart cut short: durable as far as byte `at`, before which lies `tail`."""

    site: str
    upload: bytes
    manifest: UploadManifest
    signature: bytes
    at: int
    tail: bytes


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Merge the updates, which are sorted by site, then report `Aggregated` or `AggregateFailed`."""

    task: bytes
    manifest: TaskManifest
    updates: tuple[Update, ...]
    secret: bytes = field(default=NO_KEY, repr=False)
    """Opens the updates."""


@dataclass(frozen=True, slots=True)
class RecordOpened:
    """Write down that a task was announced, before any site hears of it."""

    task: bytes
    manifest: TaskManifest
    packed: bytes
    signature: bytes
    secret: bytes = field(default=NO_KEY, repr=False)
    """Opens the uploads of this exchange: durable before the rest, deleted with the last of them."""


@dataclass(frozen=True, slots=True)
class RecordClosed:
    """Write down how a task ended and which uploads counted, before the next one is announced."""

    task: bytes
    outcome: Outcome
    counted: tuple[bytes, ...]
    result: BlobManifest | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the operator's console and log; `fields` are numbers and short words, no patient's data."""

    event: str
    fields: dict[str, str | int | float] = field(default_factory=dict)


CoordinatorEffect: TypeAlias = (
    Send
    | SendBlob
    | OpenPart
    | WritePart
    | SyncPart
    | FinishPart
    | DropPart
    | Aggregate
    | RecordOpened
    | RecordClosed
    | Note
)


@dataclass(frozen=True, slots=True)
class Connected:
    """The encrypted connection stands (again)."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection broke."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A well-formed message of the coordinator."""

    message: FromCoordinator
    body: bytes | memoryview = b""


@dataclass(frozen=True, slots=True)
class BlobStored:
    """A download is complete and durable."""

    blob: bytes


@dataclass(frozen=True, slots=True)
class BlobFailed:
    """The disk refused a download; the part is gone. The site tries again after a while."""

    blob: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class WorkDone:
    """The worker finished a task; its tensors lie in a file of the site's."""

    task: bytes
    upload: UploadManifest


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """The worker could not do a task."""

    task: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class WorkProgress:
    """The worker is under way."""

    stage: str
    step: int
    steps: int
    loss: float
    dice: float


@dataclass(frozen=True, slots=True)
class Rekeyed:
    """The site has new keys, which the coordinator knows; the old ones open nothing any more."""

    signing_key: bytes = field(repr=False)
    """Private."""
    curve_key: bytes
    """Public."""


SiteEvent: TypeAlias = (
    Connected
    | Rekeyed
    | Disconnected
    | Answered
    | BlobStored
    | BlobFailed
    | WorkDone
    | WorkFailed
    | WorkProgress
    | Stopping
    | Tick
)


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the coordinator."""

    message: FromSite
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class SayChunk:
    """Send bytes [at, at + size) of the file that the upload's blob lies in, as a `Chunk`."""

    upload: bytes
    blob: bytes
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class KeepBlobs:
    """Delete every blob, and what has arrived of any, but these: no task will ask for the others again."""

    blobs: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class StartWork:
    """Do a task whose blobs are all here; report `WorkDone`, at once if its work's result is kept, or `WorkFailed`."""

    task: bytes
    manifest: TaskManifest


@dataclass(frozen=True, slots=True)
class StopWork:
    """End the worker: its task is no longer due."""

    task: bytes


@dataclass(frozen=True, slots=True)
class Committed:
    """The coordinator holds this task's result for good: older results may be deleted."""

    task: bytes
    manifest: TaskManifest


@dataclass(frozen=True, slots=True)
class Learned:
    """The plan that the coordinator sent at the handshake: keep it."""

    plan: bytes


@dataclass(frozen=True, slots=True)
class Leave:
    """There is nothing more to do here; `code` is `finished` or a `RefusalCode` that waiting will not mend."""

    code: Literal["finished", "stopped"] | RefusalCode
    reason: str


SiteEffect: TypeAlias = (
    Say
    | SayChunk
    | OpenPart
    | WritePart
    | FinishPart
    | DropPart
    | KeepBlobs
    | StartWork
    | StopWork
    | Committed
    | Learned
    | Leave
    | Note
)
