"""A site on a bench: tests speak to it as its coordinator does."""

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from federation_builders import FEDERATION_SECRET, blob, config, curve, public, secret
from fedoap.config import Plan
from fedoap.identity import TASK_CONTEXT, sign
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap.messages import PROTOCOL_VERSION, Challenge, FromCoordinator, FromSite, Task, Welcome
from fedoap.protocol.events import Answered, Connected, Say, SiteEffect, SiteEvent, StartWork, Tick, WorkDone
from fedoap.protocol.site import Site
from simulated.training import SHAPES

MODEL, MODEL_RAW = blob({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
RESULT, RESULT_RAW = blob({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})


@dataclass
class Bench:
    """Site alpha, welcome and idle, at a time that only `wait` moves on."""

    have: frozenset[bytes] = field(default_factory=frozenset)
    partly: dict[bytes, int] = field(default_factory=dict)
    plan: Plan = field(default_factory=lambda: config().plan)

    def __post_init__(self) -> None:
        self.now = 100.0
        key = public(FEDERATION_SECRET)
        keys = key, secret("alpha"), curve("alpha")
        self.site = Site("demo", "alpha", *keys, have=self.have, partly=self.partly, software="test")
        self.connect()

    def connect(self) -> list[SiteEffect]:
        self.handle(Connected())
        self.hear(Challenge(PROTOCOL_VERSION, "desk", bytes(32)))
        return self.hear(Welcome("alpha", self.plan.digest), self.plan.to_bytes())

    def handle(self, event: SiteEvent) -> list[SiteEffect]:
        return self.site.handle(event, self.now)

    def hear(self, message: FromCoordinator, body: bytes = b"") -> list[SiteEffect]:
        return self.handle(Answered(message, body))

    def wait(self, seconds: float) -> list[SiteEffect]:
        """What the site does in this time, a tick a second."""
        effects = []
        for _ in range(int(seconds)):
            self.now += 1.0
            effects += self.handle(Tick())
        return effects

    def task(self, **changes: object) -> TaskManifest:
        manifest = TaskManifest("demo", self.plan.digest, "train", 1, 1, ("alpha", "beta"), 600, MODEL)
        return replace(manifest, **changes)  # type: ignore[arg-type]

    def give(self, manifest: TaskManifest, key: bytes = FEDERATION_SECRET) -> list[SiteEffect]:
        """Send a task, signed."""
        packed = manifest.pack()
        return self.hear(Task(name(manifest), sign(key, TASK_CONTEXT, packed)), packed)

    def done(self, manifest: TaskManifest) -> list[SiteEffect]:
        """The worker is done with a task."""
        return self.handle(WorkDone(name(manifest), upload_of(manifest)))


def name(manifest: TaskManifest) -> bytes:
    return hashlib.sha256(manifest.pack()).digest()


def upload_of(manifest: TaskManifest, result: BlobManifest = RESULT) -> UploadManifest:
    return UploadManifest(name(manifest), "alpha", 12, (("loss", 0.5),), result)


def upload_name(manifest: TaskManifest) -> bytes:
    return hashlib.sha256(upload_of(manifest).pack()).digest()


def said(effects: list[SiteEffect]) -> list[FromSite]:
    return [effect.message for effect in effects if isinstance(effect, Say)]


def started(effects: list[SiteEffect]) -> list[bytes]:
    return [effect.task for effect in effects if isinstance(effect, StartWork)]
