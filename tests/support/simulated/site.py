"""A site's daemon in the simulation: blobs, results and personal state outlast a crash, all else does not."""

import hashlib
import random
from collections.abc import Callable

from federation_builders import FEDERATION_SECRET, blob, curve, public, secret
from fedoap.config import Plan
from fedoap.messages import Chunk, FromSite
from fedoap.protocol.events import (
    BlobFailed,
    BlobStored,
    Committed,
    DropPart,
    FinishPart,
    Learned,
    Leave,
    Note,
    OpenPart,
    Say,
    SayChunk,
    SiteEffect,
    SiteEvent,
    StartWork,
    StopWork,
    Tick,
    WorkDone,
    WorkFailed,
    WorkProgress,
    WritePart,
)
from fedoap.protocol.site import Site
from fedoap.seal import Seal, public_half
from fedoap.tensors import BlobManifest, TaskManifest, UploadManifest
from simulated.network import TICK_SECONDS, Clock, Faults
from simulated.training import PERSONAL, arrays, train


class SiteProcess:
    """Runs the machine, trains, crashes now and then, and comes back."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        *,
        clock: Clock,
        rng: random.Random,
        faults: Faults,
        say: Callable[[str, FromSite, bytes], None],
        gone: Callable[[str], None],
    ) -> None:
        self.name, self._plan, self._clock, self._rng, self._faults = name, plan, clock, rng, faults
        self._say, self._gone = say, gone
        self.blobs: dict[bytes, tuple[BlobManifest, bytes]] = {}
        self._results: dict[bytes, tuple[BlobManifest, bytes]] = {}
        self._seals: dict[bytes, Seal] = {}
        self.personal = {PERSONAL: 0}
        self._parts: dict[bytes, tuple[BlobManifest, bytearray]] = {}
        self._running: bytes = b""
        self.machine: Site | None = None
        self.life = 0
        self.left: list[str] = []
        self.trained: list[bytes] = []

    def boot(self) -> None:
        self.life += 1
        self._running = b""
        self._parts, partly = dict(self._parts), {part: self._right_bytes(part) for part in self._parts}
        key = public(FEDERATION_SECRET)
        self.machine = Site(
            "demo",
            self.name,
            key,
            secret(self.name),
            curve(self.name),
            have=frozenset(self.blobs),
            partly=partly,
            software="sim",
        )
        self._tick(self.life)

    def handle(self, event: SiteEvent) -> None:
        if self.machine is None:
            return None
        for effect in self.machine.handle(event, self._clock.now):
            if self._rng.random() < self._faults.crash_site:
                return self.crash()
            self._do(effect)
        return None

    def crash(self) -> None:
        self.machine = None
        self._gone(self.name)
        self._clock.after(self._rng.random() * self._faults.outage, self.boot)

    def _tick(self, life: int) -> None:
        if life == self.life and self.machine is not None:
            self.handle(Tick())
            self._clock.after(TICK_SECONDS, lambda: self._tick(life))

    def _right_bytes(self, part: bytes) -> int:
        """How much of a download is right after a crash, which may have torn the last chunk."""
        manifest, data = self._parts[part]
        return next(
            (
                at
                for at in range(0, len(data), manifest.chunk_bytes)
                if hashlib.sha256(data[at:][: manifest.chunk(at)[0]]).digest() != manifest.chunk(at)[1]
                or self._rng.random() < 0.2
            ),
            len(data),
        )

    def _later(self, event: SiteEvent, seconds: float = 0.0) -> None:
        life = self.life
        self._clock.after(seconds, lambda: self.handle(event) if life == self.life else None)

    def _do(self, effect: SiteEffect) -> None:
        match effect:
            case Say(message, body):
                self._say(self.name, message, body)
            case SayChunk(upload, named, at, size):
                raw = next(raw for manifest, raw in self._results.values() if manifest.id == named)
                self._say(self.name, Chunk(upload, at), self._seals[upload].close(at, raw[at : at + size]))
            case OpenPart(part, size, at, manifest):
                assert manifest is not None
                kept = self._parts[part][1][:at] if at else b""
                self._parts[part] = manifest, bytearray(kept.ljust(size, b"\0"))
            case WritePart(part, at, data):
                self._parts[part][1][at : at + len(data)] = data
            case FinishPart(part, manifest):
                self._finish(part, manifest)
            case DropPart(part):
                self._parts.pop(part, None)
            case StartWork(task, manifest):
                self._start(task, manifest)
            case StopWork():
                self._running = b""
            case Committed(_, manifest):
                needed = {one.id for one in manifest.blobs}
                self.blobs = {name: one for name, one in self.blobs.items() if name in needed}
                self._results = {work: one for work, one in self._results.items() if work == manifest.work}
            case Leave(code):
                self.left.append(code)
            case Learned() | Note():
                pass

    def _finish(self, part: bytes, manifest: BlobManifest) -> None:
        raw = bytes(self._parts.pop(part)[1])
        hashes = [hashlib.sha256(raw[at:][: manifest.chunk_bytes]) for at in range(0, len(raw), manifest.chunk_bytes)]
        assert b"".join(one.digest() for one in hashes) == manifest.hashes, "a download is not what it should be"
        if self._rng.random() < self._faults.disk_full:
            return self._later(BlobFailed(part, "no space left on the disk"))
        self.blobs[part] = (manifest, raw)
        return self._later(BlobStored(part))

    def _start(self, task: bytes, manifest: TaskManifest) -> None:
        assert all(one.id in self.blobs for one in manifest.blobs), "work was started before its blobs were here"
        assert not self._running, "work was started while other work ran"
        if manifest.work in self._results:
            return self._later(self._done(task, manifest))
        self._running, life = task, self.life
        self._later(WorkProgress("train", 1, 2, 0.5, -1.0), 1.0)
        self._clock.after(2 + 10 * self._rng.random(), lambda: self._work(task, manifest, life))
        return None

    def _work(self, task: bytes, manifest: TaskManifest, life: int) -> None:
        if life != self.life or self.machine is None or self._running != task:
            return None
        self._running = b""
        if self._rng.random() < self._faults.work_fails:
            return self.handle(WorkFailed(task, "the worker ended"))
        model = arrays(*self.blobs[manifest.model.id]) if manifest.model else {}
        self._results[manifest.work] = blob(train(self.name, manifest, model, self._plan))
        self.personal[PERSONAL] += 1
        self.trained.append(manifest.work)
        return self.handle(self._done(task, manifest))

    def _done(self, task: bytes, manifest: TaskManifest) -> WorkDone:
        made, _ = self._results[manifest.work]
        key = hashlib.sha256(task + secret(self.name)).digest()
        upload = UploadManifest(task, self.name, 12, (("loss", 0.5),), made, public_half(key))
        self._seals[hashlib.sha256(upload.pack()).digest()] = Seal.of_site(upload, key, manifest.seal_key)
        return WorkDone(task, upload)
