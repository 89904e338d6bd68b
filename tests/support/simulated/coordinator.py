"""The coordinator's daemon in the simulation: its disk outlasts a crash as far as it was synced, all else does not."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from federation_builders import CHUNK_BYTES, FEDERATION_SECRET, curve, public, roster, secret
from fedoap.config import FederationConfig
from fedoap.errors import SealError
from fedoap.identity import Member, Roster
from fedoap.manifests import BlobManifest, UploadManifest
from fedoap.messages import Credit, Data, FromCoordinator, Go
from fedoap.protocol.coordinator import Coordinator
from fedoap.protocol.events import (
    Aggregate,
    Aggregated,
    AggregateFailed,
    Arriving,
    CoordinatorEffect,
    CoordinatorEvent,
    DropPart,
    FinishPart,
    Note,
    OpenPart,
    RecordClosed,
    RecordOpened,
    RosterChanged,
    Send,
    SendBlob,
    Stored,
    StoreFailed,
    SyncPart,
    Tick,
    Update,
    WritePart,
)
from fedoap.protocol.history import Revoked, replay
from fedoap.seal import Seal, sealed_at
from simulated.checks import Checks, is_intact
from simulated.disk import Disk, FullError
from simulated.network import Clock, Faults
from simulated.training import merge

NO_SPACE = "no space left on the disk"


class CrashedError(Exception):
    """The process is gone; what it had synced is not."""


class CoordinatorProcess:
    """Runs the machine, carries out its effects, crashes before a step of one now and then, and comes back."""

    def __init__(
        self,
        config: FederationConfig,
        *,
        clock: Clock,
        rng: random.Random,
        faults: Faults,
        checks: Checks,
        nonce: Callable[[int], bytes],
        send: Callable[[bytes, FromCoordinator, bytes], None],
        gone: Callable[[], None],
    ) -> None:
        self._config, self._clock, self._rng, self._faults, self._checks = config, clock, rng, faults, checks
        self._nonce, self._send, self._gone = nonce, send, gone
        self.records: list[RecordOpened | Update | Revoked | RecordClosed] = []
        self._roster = roster(sites=config.sites)
        self._synced: dict[bytes, SyncPart] = {}
        """Rows: how far each upload is durable."""
        self.disk = Disk(rng, faults.disk_full)
        self.machine: Coordinator | None = None
        self.life = 0
        self.crashes = 0

    def boot(self) -> None:
        self.life += 1
        arriving = self._arriving()
        self.disk.keep_only("parts", self._synced)
        self.disk.keep_only("blobs", {update.upload for update in self._updates()} | self._results().keys())
        self.check_blobs()
        self.machine = Coordinator(
            self._config,
            self._roster,
            replay([*self.records, *arriving]),
            signing_key=FEDERATION_SECRET,
            random_bytes=self._nonce,
            software="sim",
        )
        self._carry_out(self.machine.start(self._clock.now))
        self._tick(self.life)

    def handle(self, event: CoordinatorEvent) -> None:
        if self.machine is not None:
            self._carry_out(self.machine.handle(event, self._clock.now))

    def revoke(self, names: list[str]) -> None:
        """Withdraw the keys of sites; the operator's command writes it down, whether the daemon runs or not."""
        self.records += [Revoked(name) for name in names]
        self._checks.revoked(names)
        self._change({name: replace(one, revoked=True) for name in names if (one := self._roster.find(name))})

    def enrol(self, name: str, key: str) -> None:
        """Take in a site that has new keys."""
        self._change({name: Member(name, curve(key), public(secret(key)))})

    def _change(self, members: Mapping[str, Member]) -> None:
        now = tuple(members.get(one.name, one) for one in self._roster.members)
        self._roster = Roster(self._roster.epoch + 1, now)
        self.handle(RosterChanged(self._roster))

    def crash(self) -> None:
        self.crashes += 1
        self.machine = None
        self.disk.crash()
        self._gone()
        self._clock.after(self._rng.random() * self._faults.outage, self.boot)

    def _tick(self, life: int) -> None:
        if life == self.life and self.machine is not None:
            self.handle(Tick())
            self._clock.after(self._faults.tick, lambda: self._tick(life))

    def _carry_out(self, effects: list[CoordinatorEffect]) -> None:
        try:
            for effect in effects:
                self._perhaps_crash()
                self._do(effect)
        except (CrashedError, FullError):  # the daemon ends when its ledger cannot be written
            self.crash()

    def _perhaps_crash(self) -> None:
        chance = self._faults.crash_coordinator
        if chance and self._rng.random() < chance:
            raise CrashedError

    def _later(self, event: CoordinatorEvent, seconds: float = 0.0) -> None:
        life = self.life
        self._clock.after(seconds, lambda: self.handle(event) if life == self.life else None)

    def _do(self, effect: CoordinatorEffect) -> None:
        match effect:
            case Send(route, message, body):
                self._checked(message)
                self._send(route, message, body)
            case SendBlob(route, blob, at, upto):
                self._send_blob(route, blob, at, upto)
            case OpenPart() | WritePart() | SyncPart() | FinishPart() | DropPart():
                self._write(effect)
            case Aggregate():
                self._aggregate(effect)
            case RecordOpened() | RecordClosed():
                self._record(effect)
            case Note():
                pass

    def _checked(self, message: FromCoordinator) -> None:
        self._checks.coordinator_says(message)
        if isinstance(message, Go | Credit) and self.machine is not None:
            self._checks.credit_is_bounded(self.machine, CHUNK_BYTES)

    def _write(self, effect: OpenPart | WritePart | SyncPart | FinishPart | DropPart) -> None:
        match effect:
            case OpenPart(part, _, at) if at:
                assert self._synced[part].at == at, "an upload goes on where it is not known to be durable"
            case OpenPart(part, size):
                self._synced.pop(part, None)
                self._open(part, size)
            case WritePart(part, at, data):
                self.disk.write(("parts", part), at, bytes(data))
            case SyncPart(part):
                self._sync(part, effect)
            case FinishPart():
                self._finish(effect)
            case DropPart(part):
                self._synced.pop(part, None)
                self.disk.remove(("parts", part))

    def _sync(self, part: bytes, effect: SyncPart) -> None:
        if not self.disk.has(("parts", part)):
            return
        self.disk.sync(("parts", part))
        self._perhaps_crash()
        self.disk.sync_folders()
        self._perhaps_crash()
        self._synced[part] = effect

    def _open(self, part: bytes, size: int) -> None:
        try:
            self.disk.create(("parts", part), size)
        except FullError:
            self._later(StoreFailed(part, "no_space", NO_SPACE))

    def _send_blob(self, route: bytes, blob: bytes, at: int, upto: int) -> None:
        raw = self.disk.read(("blobs", blob))
        for start in range(at, upto, CHUNK_BYTES):
            self._send(route, Data(blob, start), raw[start : min(upto, start + CHUNK_BYTES)])

    def _finish(self, effect: FinishPart) -> None:
        """Store an upload as the real store does: bytes, name, row."""
        part = ("parts", effect.part)
        assert effect.upload is not None
        if not self.disk.has(part):
            return  # its failure is on the way
        self.disk.sync(part)
        self._adopt(part, effect.part)
        self._record(Update(effect.site, effect.part, effect.upload))
        self._synced.pop(effect.part, None)
        self._perhaps_crash()
        self._later(Stored(effect.part))

    def _aggregate(self, effect: Aggregate) -> None:
        self._checks.merging(effect)
        updates = tuple((update.manifest, self._read_update(update)) for update in effect.updates)
        life, (manifest, raw) = self.life, merge(effect.manifest, updates)
        return self._clock.after(1.0, lambda: self._publish(effect.task, manifest, raw) if life == self.life else None)

    def _publish(self, task: bytes, manifest: BlobManifest, raw: bytes) -> None:
        if self.machine is None:
            return None
        draft = ("merge", task)
        try:
            self.disk.create(draft, len(raw))
        except FullError:
            return self.handle(AggregateFailed(task, NO_SPACE))
        try:
            self.disk.write(draft, 0, raw)
            self._perhaps_crash()
            self.disk.sync(draft)
            self._adopt(draft, manifest.id)
        except CrashedError:
            return self.crash()
        return self.handle(Aggregated(task, manifest))

    def _adopt(self, source: tuple[str, bytes], name: bytes) -> None:
        self._perhaps_crash()
        self.disk.rename(source, ("blobs", name))
        self._perhaps_crash()
        self.disk.sync_folders()
        self._perhaps_crash()

    def _record(self, record: RecordOpened | Update | RecordClosed) -> None:
        self.disk.need_space()
        self.records.append(record)
        self._checks.recorded(record)

    def _arriving(self) -> list[Arriving]:
        """What the store says of uploads under way, as it starts."""
        opened = replay(self.records).open
        parts = set(self.disk.names("parts"))
        rows = self._synced.items()
        self._synced = {part: row for part, row in rows if opened and row.upload.task == opened.task and part in parts}
        return [
            Arriving(row.site, part, row.upload, row.signature, row.at, self._tail(row))
            for part, row in self._synced.items()
        ]

    def _tail(self, row: SyncPart) -> bytes:
        return self._opened(row.upload, self.disk.read(("parts", row.part)))[: row.at][-7:]

    def _updates(self) -> list[Update]:
        return [one for one in self.records if isinstance(one, Update) and one.manifest.blob.size]

    def _results(self) -> dict[bytes, BlobManifest]:
        """Return every result that a record names; all are kept here, so that the end can look at each."""
        results = [one.result for one in self.records if isinstance(one, RecordClosed) and one.result is not None]
        published = replay(self.records)
        bases = [blob for blob in (published.model, published.bank) if blob is not None]
        return {blob.id: blob for blob in [*results, *bases] if blob.size}

    def _read(self, manifest: BlobManifest) -> bytes:
        assert self.disk.has(("blobs", manifest.id)), "a blob is missing, but the ledger needs it"
        raw = self.disk.read(("blobs", manifest.id))
        assert is_intact(manifest, raw), "a blob that is on record is damaged"
        return raw

    def _read_update(self, update: Update) -> bytes:
        if not update.manifest.blob.size:
            return b""
        assert self.disk.has(("blobs", update.upload)), "a blob is missing, but the ledger needs it"
        plain = self._opened(update.manifest, self.disk.read(("blobs", update.upload)))
        assert is_intact(update.manifest.blob, plain), "an upload that is on record is damaged"
        return plain

    def _opened(self, upload: UploadManifest, raw: bytes) -> bytes:
        """The plain bytes of a sealed upload, up to the first chunk that does not open."""
        blob, plain = upload.blob, b""
        secret = next(one.secret for one in self.records if isinstance(one, RecordOpened) and one.task == upload.task)
        seal = Seal.of_exchange(upload, secret)
        for at in range(0, blob.size, blob.chunk_bytes):
            try:
                plain += seal.open(at, raw[sealed_at(blob, at) : sealed_at(blob, at + blob.chunk(at)[0])])
            except SealError:
                break
        return plain

    def check_blobs(self) -> None:
        """Look at every byte of every blob that is on record."""
        for update in self._updates():
            self._read_update(update)
        for blob in self._results().values():
            self._read(blob)
