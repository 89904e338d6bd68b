"""What the coordinator remembers: ledger and blobs, written in an order that survives a crash at any point.

An upload: part on disk, blob and manifest renamed into place, row; only then may the site be told. On its
way it is made durable now and then: data on disk, then the row that says how far. That row goes before
its part is deleted or emptied, so an offset on record is always one whose bytes are on the disk. A
result: durable files of the aggregation process renamed into place, row of the published blob, row of
the closed exchange with its signed record, rows of what is kept no longer, deletion of that. Whatever a
crash leaves half done is either done again by the protocol (its row is missing) or deleted at the next
start (no row keeps it).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedoap.config import BlobFiles, RetentionConfig
from fedoap.errors import SealError, StorageError
from fedoap.manifests import NO_KEY, BlobManifest, TaskKind
from fedoap.protocol.events import (
    Arriving,
    DropPart,
    FinishPart,
    OpenPart,
    RecordClosed,
    RecordOpened,
    Stored,
    StoreFailed,
    SyncPart,
    Update,
    WritePart,
)
from fedoap.protocol.history import BANK_KINDS, MODEL_KINDS, History, Record, Revoked, replay
from fedoap.seal import TAG_BYTES, Seal, sealed_at
from fedoap.transfer import TAIL_BYTES
from fedoap_coordinator.blobs import Blobs, Trouble
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.notary import Sign
from fedoap_coordinator.rows import PartRow, TaskRow

StoreEffect: TypeAlias = OpenPart | WritePart | SyncPart | FinishPart | DropPart | RecordOpened | RecordClosed


@dataclass(frozen=True, slots=True)
class Made:
    """A durable result that is not yet in its place; `master` is its float32 original if it was rounded."""

    manifest: BlobManifest
    source: Path
    master: tuple[Path, BlobManifest] | None = None


class Store:
    """The one writer of a state folder's exchanges; `clock` gives Unix time in seconds."""

    def __init__(
        self, ledger: Ledger, blobs: Blobs, clock: Callable[[], float], sign: Sign, retention: RetentionConfig
    ) -> None:
        self.ledger, self.blobs, self._clock, self._sign, self._retention = ledger, blobs, clock, sign, retention
        self._drop_what_is_over()
        for blob in sorted(ledger.kept() | self._in_use()):
            if not blobs.has(blob):
                raise StorageError(
                    f"{blobs.files(blob).blob}: blob is missing, but the ledger keeps it: put it back from a backup"
                )
        self._arriving = tuple(self._under_way())
        self._recorded = {one.upload for one in self._arriving}
        for row in ledger.parts():
            if row.upload not in self._recorded:
                ledger.forget_part(row.upload)
        blobs.keep_parts(frozenset(self._recorded))

    def history(self) -> History:
        """Return what was durable when the last coordinator ended."""
        return replay(self._records())

    def apply(self, effect: StoreEffect) -> Stored | StoreFailed | None:
        """Carry out what a machine asks of the disk, and return what it waits for, if anything."""
        match effect:
            case OpenPart(part, size, 0):
                self._forget(part)
                return self._failed(part, self.blobs.open_part(part, size))
            case OpenPart(part, size):
                return self._failed(part, self.blobs.reopen_part(part, size))
            case WritePart(part, at, data):
                return self._failed(part, self.blobs.write_part(part, at, data))
            case SyncPart(part, at, upload, site, signature):
                if self.blobs.sync_part(part):
                    self.ledger.record_part(part, site, upload, signature, at)
                    self._recorded.add(part)
            case FinishPart():
                return self._finish(effect)
            case DropPart(part):
                self._drop(part)
            case RecordOpened(task, _, packed, signature, secret):
                self.blobs.seals.add(task, secret)
                self.ledger.open_task(task, packed, signature, self._clock())
            case RecordClosed():
                self.ledger.close_task(effect, self._clock(), self._sign)
                self._drop_what_is_over()
        return None

    def publish(self, made: Made) -> None:
        """Take a result over: from now on sites may fetch it."""
        blob = made.manifest.id
        if made.master:
            self.blobs.adopt(*made.master, self.blobs.master(blob))
        self.blobs.adopt(made.source, made.manifest, self.blobs.files(blob))
        self.ledger.publish(made.manifest, self._clock(), made.master[1] if made.master else None)

    def files(self, manifest: BlobManifest, *, exact: bool = False) -> BlobFiles:
        """Return where a blob lies, or with `exact` its float32 original where it was rounded."""
        master = self.blobs.master(manifest.id)
        return master if exact and master.blob.exists() else self.blobs.files(manifest.id)

    def _finish(self, effect: FinishPart) -> Stored | StoreFailed:
        assert effect.upload is not None, "a coordinator stores uploads only"
        trouble = self.blobs.finish_part(effect.part, effect.upload)
        if failed := self._failed(effect.part, trouble):
            return failed
        self.ledger.add_update(effect.part, effect.site, effect.upload, effect.signature, self._clock())
        self._forget(effect.part)
        return Stored(effect.part)

    def _failed(self, part: bytes, trouble: Trouble | None) -> StoreFailed | None:
        if trouble is None:
            return None
        self._drop(part)
        return StoreFailed(part, *trouble)

    def _drop(self, part: bytes) -> None:
        self._forget(part)
        self.blobs.drop_part(part)

    def _forget(self, part: bytes) -> None:
        if part in self._recorded:
            self.ledger.forget_part(part)
            self._recorded.discard(part)

    def _under_way(self) -> Iterator[Arriving]:
        """Yield the uploads of the open exchange that can go on: all others would be let go anyway."""
        for row in self.ledger.tasks()[-1:]:
            committed = {one.site for one in self.ledger.updates(row.task)}
            for one in self.ledger.parts():
                if one.manifest.task == row.task and not row.outcome and one.site not in committed:
                    yield from self._arrived(one)

    def _arrived(self, row: PartRow) -> Iterator[Arriving]:
        blob = row.manifest.blob
        last = row.at - blob.chunk_bytes
        sealed = self.blobs.read_part(row.upload, sealed_at(blob, last), blob.chunk_bytes + TAG_BYTES)
        try:
            tail = Seal.of_exchange(row.manifest, self._secret(row.manifest.task)).open(last, sealed)[-TAIL_BYTES:]
        except SealError:  # the part is not what was recorded: its site sends all of it again
            return
        yield Arriving(row.site, row.upload, row.manifest, row.signature, row.at, tail)

    def _secret(self, task: bytes) -> bytes:
        secret = self.blobs.seals.secret(task)
        if secret is None:
            raise StorageError(f"{self.blobs.seals.path(task)}: seal's key is missing, but the open exchange needs it")
        return secret

    def _records(self) -> Iterator[Record]:
        for row in self.ledger.tasks():
            secret = NO_KEY if row.outcome else self._secret(row.task)
            yield RecordOpened(row.task, row.manifest, row.packed, row.signature, secret)
            updates = self.ledger.updates(row.task)
            for one in updates:
                yield Update(one.site, one.upload, one.manifest)
            if row.outcome:
                counted = tuple(one.upload for one in updates if one.counted)
                result = self.ledger.published(row.result) if row.result else None
                yield RecordClosed(row.task, row.outcome, counted, result, row.reason)
            else:
                at = ((site, self.ledger.revoked_at(site)) for site in row.manifest.cohort)
                yield from (Revoked(site) for site, when in at if when is not None and when >= row.opened)
        yield from (one for one in self._arriving if one.upload in self._recorded)

    def _drop_what_is_over(self) -> None:
        """Write down what is kept no longer, then delete it; at the next start a crash between the two is mended."""
        tasks = self.ledger.tasks()
        remade = [row for kinds in _KINDS for row in _last(tasks, kinds, self._retention.upload_rounds)]
        results = {row.result for kinds in _KINDS for row in _last(tasks, kinds, self._retention.results) if row.result}
        bases = {blob.id for row in [*remade, *_open(tasks)] for blob in row.manifest.blobs}
        uploads = {one.upload for row in remade for one in self.ledger.updates(row.task) if one.counted}
        uploads |= {one.upload for row in _open(tasks) for one in self.ledger.updates(row.task)}
        self.ledger.keep_only(uploads, results | bases)
        self.blobs.keep_only(self.ledger.kept() | self._in_use())
        # last, as no upload may outlast what opens it
        self.blobs.seals.keep_only({row.task for row in [*remade, *_open(tasks)]})

    def _in_use(self) -> frozenset[bytes]:
        """Return the blobs that the run cannot go on without."""
        tasks = self.ledger.tasks()
        results = {row.result for kinds in _KINDS for row in _last(tasks, kinds, 1) if row.result}
        bases = {blob.id for row in _open(tasks) for blob in row.manifest.blobs}
        return frozenset(results | bases)


_KINDS = (MODEL_KINDS, BANK_KINDS)


def _last(tasks: tuple[TaskRow, ...], kinds: frozenset[TaskKind], count: int) -> list[TaskRow]:
    """Return the last so many exchanges that made a model, or a bank."""
    made = [row for row in tasks if row.result and row.manifest.kind in kinds]
    return made[len(made) - min(count, len(made)) :]


def _open(tasks: tuple[TaskRow, ...]) -> list[TaskRow]:
    return [row for row in tasks[-1:] if not row.outcome]
