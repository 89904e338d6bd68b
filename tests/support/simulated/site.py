"""A site's daemon in the simulation: blobs and results outlast a crash as far as synced, all else does not."""

import hashlib
import random
from collections.abc import Callable

from federation_builders import FEDERATION_SECRET, curve, public, secret
from fedoap.config import Plan
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap.messages import Chunk, FromSite
from fedoap.protocol.events import (
    BlobFailed,
    BlobStored,
    Committed,
    DropPart,
    FinishPart,
    KeepBlobs,
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
from simulated.coordinator import NO_SPACE, CrashedError
from simulated.disk import Disk, FullError
from simulated.network import Clock, Faults
from simulated.training import result

FEDERATION_KEY = public(FEDERATION_SECRET)


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
        self.disk = Disk(rng, faults.disk_full)
        self._made: dict[bytes, BlobManifest] = {}
        """What lies in `results`, by work; in reality a file in the same folder."""
        self._seals: dict[bytes, Seal] = {}
        self._growing: dict[bytes, BlobManifest] = {}
        """What lies beside each part: the manifest of the blob that it is to become."""
        self._running: bytes = b""
        self.machine: Site | None = None
        self.life = 0
        self.crashes = 0
        self.joins = 0
        self.has_finished = False
        self.trained: list[bytes] = []

    def boot(self) -> None:
        self.life += 1
        self._running = b""
        partly = {part: self._right_bytes(part) for part in self.disk.names("parts")}
        have = frozenset(self.disk.names("blobs"))
        self.machine = Site(
            "demo",
            self.name,
            FEDERATION_KEY,
            secret(self.key),
            curve(self.key),
            have=have,
            partly=partly,
            software="sim",
        )
        self._tick(self.life)

    @property
    def key(self) -> str:
        """What the site's keys are made from."""
        return f"{self.name} {self.joins}" if self.joins else self.name

    def join_anew(self) -> str:
        """Start with nothing but new keys, and return what they are made from."""
        self.joins += 1
        self.disk = Disk(self._rng, self._faults.disk_full)
        self.boot()
        return self.key

    def handle(self, event: SiteEvent) -> None:
        if self.machine is None:
            return
        try:
            for effect in self.machine.handle(event, self._clock.now):
                self._perhaps_crash()
                self._do(effect)
        except CrashedError:
            self.crash()

    def crash(self) -> None:
        self.crashes += 1
        self.machine = None
        self.disk.crash()
        self._gone(self.name)
        life = self.life
        self._clock.after(self._rng.random() * self._faults.outage, lambda: self.boot() if life == self.life else None)

    def _perhaps_crash(self) -> None:
        chance = self._faults.crash_site
        if chance and self._rng.random() < chance:
            raise CrashedError

    def _tick(self, life: int) -> None:
        if life == self.life and self.machine is not None:
            self.handle(Tick())
            self._clock.after(self._faults.tick, lambda: self._tick(life))

    def _later(self, event: SiteEvent, seconds: float = 0.0) -> None:
        life = self.life
        self._clock.after(seconds, lambda: self.handle(event) if life == self.life else None)

    def _do(self, effect: SiteEffect) -> None:
        match effect:
            case Say(message, body):
                self._say(self.name, message, body)
            case SayChunk():
                self._say_chunk(effect)
            case OpenPart():
                self._open(effect)
            case WritePart(part, at, data):
                self.disk.write(("parts", part), at, bytes(data))
            case FinishPart(part):
                self._finish(part)
            case DropPart(part):
                self.disk.remove(("parts", part))
            case StartWork(task, manifest):
                self._start(task, manifest)
            case StopWork():
                self._running = b""
            case KeepBlobs(blobs):
                self.disk.keep_only("blobs", blobs)
            case Committed(_, manifest):
                self.disk.keep_only("results", {manifest.work})
            case Leave(code):
                self._leave(code)
            case _:
                assert isinstance(effect, Learned | Note)

    def _say_chunk(self, effect: SayChunk) -> None:
        work = next(work for work, manifest in self._made.items() if manifest.id == effect.blob)
        raw = self.disk.read(("results", work))[effect.at : effect.at + effect.size]
        self._say(self.name, Chunk(effect.upload, effect.at), self._seals[effect.upload].close(effect.at, raw))

    def _leave(self, code: str) -> None:
        """End; whoever runs the daemon starts it again, unless the federation has finished."""
        if code == "finished":
            self.has_finished = True
        elif code != "stopped":
            raise CrashedError

    def _open(self, effect: OpenPart) -> None:
        assert effect.blob is not None
        self._growing[effect.part] = effect.blob
        if effect.at:
            return
        try:
            self.disk.create(("parts", effect.part), effect.size)
        except FullError:
            self._later(BlobFailed(effect.part, NO_SPACE))

    def _right_bytes(self, part: bytes) -> int:
        """How much of a download is right after a crash, which may have torn any chunk of it."""
        manifest, raw = self._growing[part], self.disk.read(("parts", part))
        starts = range(0, manifest.size, manifest.chunk_bytes)
        sizes = {at: manifest.chunk(at) for at in starts}
        wrong = (at for at, (size, digest) in sizes.items() if hashlib.sha256(raw[at : at + size]).digest() != digest)
        return next(wrong, manifest.size)

    def _finish(self, part: bytes) -> None:
        if not self.disk.has(("parts", part)):
            return None  # its failure is on the way
        try:
            self.disk.need_space()  # for the manifest beside it
        except FullError:
            self.disk.remove(("parts", part))
            return self._later(BlobFailed(part, NO_SPACE))
        self._keep(("parts", part), ("blobs", part))
        return self._later(BlobStored(part))

    def _keep(self, source: tuple[str, bytes], target: tuple[str, bytes]) -> None:
        self.disk.sync(source)
        self._perhaps_crash()
        self.disk.rename(source, target)
        self._perhaps_crash()
        self.disk.sync_folders()
        self._perhaps_crash()

    def _start(self, task: bytes, manifest: TaskManifest) -> None:
        have = self.disk.names("blobs")
        assert all(one.id in have for one in manifest.blobs), "work was started before its blobs were here"
        assert not self._running, "work was started while other work ran"
        if self.disk.has(("results", manifest.work)):
            return self._later(self._done(task, manifest))
        self._running, life = task, self.life
        if self._rng.random() < 0.25:
            self._later(WorkProgress("train", 1, 2, 0.5, -1.0), 0.5)
        return self._clock.after(
            self._faults.work * (0.2 + 0.8 * self._rng.random()), lambda: self._work(task, manifest, life)
        )

    def _work(self, task: bytes, manifest: TaskManifest, life: int) -> None:
        if life != self.life or self.machine is None or self._running != task:
            return None
        self._running = b""
        if self._faults.work_fails and self._rng.random() < self._faults.work_fails:
            return self.handle(WorkFailed(task, "the worker ended"))
        model = (manifest.model, self.disk.read(("blobs", manifest.model.id))) if manifest.model else None
        made, raw = result(self.name, manifest, model, self._plan)
        self._made[manifest.work] = made
        draft, place = ("drafts", manifest.work), ("results", manifest.work)
        try:
            self.disk.create(draft, len(raw))
            self.disk.write(draft, 0, raw)
            self._keep(draft, place)
        except FullError:
            return self.handle(WorkFailed(task, NO_SPACE))
        except CrashedError:
            return self.crash()
        self.trained.append(manifest.work)
        return self.handle(self._done(task, manifest))

    def _done(self, task: bytes, manifest: TaskManifest) -> WorkDone:
        key = hashlib.sha256(task + secret(self.key)).digest()
        made = self._made[manifest.work]
        upload = UploadManifest(task, self.name, 12, (("loss", 0.5),), made, public_half(key))
        self._seals[hashlib.sha256(upload.pack()).digest()] = Seal.of_site(upload, key, manifest.seal_key)
        return WorkDone(task, upload)
