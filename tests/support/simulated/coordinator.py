"""The coordinator's daemon in the simulation: records and blobs outlast a crash, all else does not.

Of an upload under way a crash leaves what was made durable, and of the rest what chance will have.
"""

import random
from collections.abc import Callable
from contextlib import suppress

from federation_builders import CHUNK_BYTES, FEDERATION_SECRET, roster
from fedoap.config import FederationConfig
from fedoap.errors import SealError
from fedoap.messages import Data, FromCoordinator
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
    Send,
    SendBlob,
    Stored,
    StoreFailed,
    SyncPart,
    Tick,
    Update,
    WritePart,
)
from fedoap.protocol.history import Record, replay
from fedoap.seal import TAG_BYTES, Seal, sealed_at
from fedoap.tensors import BlobManifest, UploadManifest
from simulated.checks import Checks
from simulated.network import TICK_SECONDS, Clock, Faults
from simulated.training import merge


class CrashedError(Exception):
    """The process is gone; what it had recorded is not."""


class CoordinatorProcess:
    """Runs the machine, carries out its effects, crashes before one of them now and then, and comes back."""

    def __init__(
        self,
        config: FederationConfig,
        *,
        clock: Clock,
        rng: random.Random,
        faults: Faults,
        checks: Checks,
        send: Callable[[bytes, FromCoordinator, bytes], None],
        gone: Callable[[], None],
    ) -> None:
        self._config, self._clock, self._rng, self._faults, self._checks = config, clock, rng, faults, checks
        self._send, self._gone = send, gone
        self.records: list[Record] = []
        self.blobs: dict[bytes, tuple[BlobManifest, bytes]] = {}
        self._parts: dict[bytes, bytearray] = {}
        self._synced: dict[bytes, tuple[SyncPart, bytes]] = {}
        self.machine: Coordinator | None = None
        self.life = 0
        self.crashes = 0

    def boot(self) -> None:
        self.life += 1
        history = replay([*self.records, *self._arriving()])
        self.machine = Coordinator(
            self._config,
            roster(),
            history,
            signing_key=FEDERATION_SECRET,
            random_bytes=self._rng.randbytes,
            software="sim",
        )
        self._carry_out(self.machine.start(self._clock.now))
        self._tick(self.life)

    def handle(self, event: CoordinatorEvent) -> None:
        if self.machine is not None:
            self._carry_out(self.machine.handle(event, self._clock.now))

    def _tick(self, life: int) -> None:
        if life == self.life and self.machine is not None:
            self.handle(Tick())
            self._clock.after(TICK_SECONDS, lambda: self._tick(life))

    def _carry_out(self, effects: list[CoordinatorEffect]) -> None:
        try:
            for effect in effects:
                self._crash_if(self._rng.random() < self._faults.crash_coordinator)
                self._do(effect)
        except CrashedError:
            self.crash()
        if self.machine is not None:
            self._checks.credit_is_bounded(self.machine, CHUNK_BYTES)

    def crash(self) -> None:
        self.crashes += 1
        self.machine = None
        self._parts = {part: self._left(part, data) for part, data in self._parts.items() if part in self._synced}
        self._gone()
        self._clock.after(self._rng.random() * self._faults.outage, self.boot)

    def _left(self, part: bytes, data: bytearray) -> bytearray:
        """What the disk holds after a crash: a chunk that was not synced is there, torn, or not there."""
        _, left = self._synced[part]
        disk, step = bytearray(left), CHUNK_BYTES + TAG_BYTES
        for at in range(0, len(disk), step):
            if disk[at : at + step] != data[at : at + step]:
                torn = at + self._rng.choice([0, step // 2, step])
                disk[at:torn] = data[at:torn]
        return disk

    def _arriving(self) -> list[Arriving]:
        """What the store says of uploads under way, as it starts."""
        opened = replay(self.records).open
        mine = [one for one, _ in self._synced.values() if opened and one.upload.task == opened.task]
        self._synced = {one.part: self._synced[one.part] for one in mine if one.part in self._parts}
        self._parts = {part: self._parts[part] for part in self._synced}
        return [
            Arriving(one.site, one.part, one.upload, one.signature, one.at, self._tail(one))
            for one, _ in self._synced.values()
        ]

    def _tail(self, one: SyncPart) -> bytes:
        return self._opened(one.upload, bytes(self._parts[one.part]))[: one.at][-7:]

    def _crash_if(self, is_due: bool, /) -> None:
        if is_due:
            raise CrashedError

    def _later(self, event: CoordinatorEvent, seconds: float = 0.0) -> None:
        life = self.life
        self._clock.after(seconds, lambda: self.handle(event) if life == self.life else None)

    def _full(self) -> bool:
        return self._rng.random() < self._faults.disk_full

    def _do(self, effect: CoordinatorEffect) -> None:
        match effect:
            case Send(route, message, body):
                self._checks.coordinator_says(route, message)
                self._send(route, message, body)
            case SendBlob(route, blob, at, upto):
                self._send_blob(route, blob, at, upto)
            case OpenPart() | WritePart() | SyncPart() | FinishPart() | DropPart():
                self._write(effect)
            case Aggregate():
                self._aggregate(effect)
            case RecordOpened() | RecordClosed():
                self._crash_if(self._full())  # the daemon ends when its ledger cannot be written
                self._record(effect)
            case Note():
                pass

    def _write(self, effect: OpenPart | WritePart | SyncPart | FinishPart | DropPart) -> None:
        match effect:
            case OpenPart(part, _, at) if at:
                assert self._synced[part][0].at == at, "an upload goes on where it is not known to be durable"
            case OpenPart(part, size):
                self._synced.pop(part, None)
                if self._full():
                    self._later(StoreFailed(part, "no_space", "no space left on the disk"))
                else:
                    self._parts[part] = bytearray(size)
            case WritePart(part, at, data):
                self._parts.get(part, bytearray())[at : at + len(data)] = data
            case SyncPart(part):
                if part in self._parts:
                    self._synced[part] = effect, bytes(self._parts[part])
            case FinishPart():
                self._finish(effect)
            case DropPart(part):
                self._synced.pop(part, None)
                self._parts.pop(part, None)

    def _send_blob(self, route: bytes, blob: bytes, at: int, upto: int) -> None:
        manifest, raw = self.blobs[blob]
        for start in range(at, upto, manifest.chunk_bytes):
            self._send(route, Data(blob, start), raw[start : start + manifest.chunk_bytes])

    def _finish(self, effect: FinishPart) -> None:
        raw = self._parts.pop(effect.part, None)
        self._synced.pop(effect.part, None)
        if raw is None:
            return None  # its failure is on the way
        if self._full():
            return self._later(StoreFailed(effect.part, "no_space", "no space left on the disk"))
        assert effect.upload is not None
        plain = self._opened(effect.upload, bytes(raw))
        self._checks.stored(effect.blob, plain)
        self._keep(effect.blob, plain)
        self._record(Update(effect.site, effect.part, effect.upload))
        return self._later(Stored(effect.part))

    def _opened(self, upload: UploadManifest, raw: bytes) -> bytes:
        """The plain bytes of a sealed upload; none of a chunk that does not open."""
        blob = upload.blob
        seal, plain = Seal.of_exchange(upload, self._secret(upload.task)) if blob.size else None, b""
        for at in range(0, blob.size, blob.chunk_bytes):
            assert seal is not None
            start, stop = sealed_at(blob, at), sealed_at(blob, at + blob.chunk(at)[0])
            with suppress(SealError):
                plain += seal.open(at, raw[start:stop])
        return plain

    def _secret(self, task: bytes) -> bytes:
        return next(one.secret for one in self.records if isinstance(one, RecordOpened) and one.task == task)

    def _aggregate(self, effect: Aggregate) -> None:
        self._checks.merging(effect)
        if self._full():
            return self._later(AggregateFailed(effect.task, "no space left on the disk"), 1.0)
        updates = [(update.manifest, self.blobs[update.manifest.blob.id][1]) for update in effect.updates]
        manifest, raw = merge(effect.manifest, updates)
        self._keep(manifest, raw)
        return self._later(Aggregated(effect.task, manifest), 1.0)

    def _keep(self, manifest: BlobManifest, raw: bytes) -> None:
        self._checks.kept(self.blobs, manifest, raw)
        self.blobs[manifest.id] = (manifest, raw)

    def _record(self, record: RecordOpened | Update | RecordClosed) -> None:
        self.records.append(record)
        self._checks.recorded(record)
