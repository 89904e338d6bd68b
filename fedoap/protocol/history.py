"""What a federation has behind it: read back from the coordinator's records after a restart.

The coordinator's store writes three kinds of record, in this order for each exchange: `RecordOpened`,
an `Update` for each upload that became durable, `RecordClosed`. At a start it adds an `Arriving` for each
upload that is durable in part. A `Revoked` for each site that lost its key in the open exchange follows from
the roster.
`replay` makes a `History` of them, and a `Coordinator` that is given this history goes on exactly where
the one before it ended.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedoap.chain import Outcome
from fedoap.manifests import NO_KEY, BlobManifest, TaskKind, TaskManifest, TensorSpec
from fedoap.protocol.events import Arriving, RecordClosed, RecordOpened, Update

MODEL_KINDS: frozenset[TaskKind] = frozenset({"init", "train"})
BANK_KINDS: frozenset[TaskKind] = frozenset({"seed", "bank"})


@dataclass(frozen=True, slots=True)
class Revoked:
    """A site whose key was revoked after the exchange was opened, though it may have joined anew since."""

    site: str


Record: TypeAlias = RecordOpened | Update | Arriving | Revoked | RecordClosed


@dataclass(frozen=True, slots=True)
class ClosedExchange:
    """An exchange that is over; `counted` names the uploads that entered the result, sorted by site."""

    task: bytes
    kind: TaskKind
    round: int
    attempt: int
    outcome: Outcome
    counted: tuple[bytes, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OpenExchange:
    """The exchange that was under way, with what is durable of it."""

    task: bytes
    manifest: TaskManifest
    packed: bytes
    signature: bytes
    secret: bytes = field(default=NO_KEY, repr=False)
    updates: tuple[Update, ...] = ()
    arriving: tuple[Arriving, ...] = ()
    """Uploads that were under way when the coordinator started."""
    revoked: frozenset[str] = frozenset()
    """Sites that sit this exchange out: what they sent, they sent under a key that was revoked since."""


@dataclass(frozen=True, slots=True)
class History:
    """The published model and bank, every exchange that is over, and the one that is not."""

    model: BlobManifest | None = None
    bank: BlobManifest | None = None
    closed: tuple[ClosedExchange, ...] = ()
    open: OpenExchange | None = None

    @property
    def schema(self) -> tuple[TensorSpec, ...] | None:
        """The tensors that each `train` upload must hold, fixed by the first weights; none before those."""
        return None if self.model is None else self.model.tensors


def replay(records: Iterable[Record]) -> History:
    """Return the history that the records tell, given in the order in which they were written."""
    history = History()
    for record in records:
        history = after(history, record)
    return history


def after(history: History, record: Record) -> History:
    """Return the history with one more record; what does not belong to the open exchange adds nothing."""
    match record, history.open:
        case RecordOpened(), _:
            opened = OpenExchange(record.task, record.manifest, record.packed, record.signature, record.secret)
            return replace(history, open=opened)
        case Update(), OpenExchange() as opened if record.manifest.task == opened.task:
            first = all(update.site != record.site for update in opened.updates)
            return replace(history, open=_with(opened, record)) if first else history
        case Arriving(), OpenExchange() as opened if record.manifest.task == opened.task:
            return replace(history, open=replace(opened, arriving=(*opened.arriving, record)))
        case Revoked(site), OpenExchange() as opened:
            return replace(history, open=replace(opened, revoked=opened.revoked | {site}))
        case RecordClosed(), OpenExchange() as opened if record.task == opened.task:
            return _closed(history, opened.manifest, record)
        case _:
            return history


def _with(opened: OpenExchange, update: Update) -> OpenExchange:
    updates = sorted([*opened.updates, update], key=lambda one: one.site)
    return replace(opened, updates=tuple(updates))


def _closed(history: History, manifest: TaskManifest, record: RecordClosed) -> History:
    kind = manifest.kind
    over = ClosedExchange(
        record.task, kind, manifest.round, manifest.attempt, record.outcome, record.counted, record.reason
    )
    return History(
        model=record.result if kind in MODEL_KINDS and record.result else history.model,
        bank=record.result if kind in BANK_KINDS and record.result else history.bank,
        closed=(*history.closed, over),
    )
