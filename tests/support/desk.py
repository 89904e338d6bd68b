"""A coordinator on a desk: tests speak to it as its sites do, and it carries out its own effects at once."""

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federation_builders import CHUNK_BYTES, FEDERATION_SECRET, blob, config, curve, roster, secret
from fedoap.config import FederationConfig
from fedoap.identity import HELLO_CONTEXT, UPLOAD_CONTEXT, Roster, hello_payload, sign
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap.messages import (
    PROTOCOL_VERSION,
    Challenge,
    Chunk,
    FromCoordinator,
    FromSite,
    Hello,
    Offer,
    Open,
    Refuse,
    Sync,
)
from fedoap.protocol.coordinator import Coordinator
from fedoap.protocol.events import (
    Aggregate,
    Aggregated,
    Arriving,
    CoordinatorEffect,
    CoordinatorEvent,
    FinishPart,
    Received,
    RecordClosed,
    RecordOpened,
    Send,
    Stored,
    SyncPart,
    Tick,
    Update,
    WritePart,
)
from fedoap.protocol.history import History, OpenExchange, Record, after
from fedoap.seal import TAG_BYTES, Seal, public_half, sealed_at
from simulated.training import SHAPES, train

Effects = list[CoordinatorEffect]
Arrays = dict[str, NDArray[np.generic]]


@dataclass
class Desk:
    """The machine, what it recorded, and all effects since `effects` was last emptied."""

    config: FederationConfig = field(default_factory=config)
    roster: Roster = field(default_factory=roster)
    records: list[Record] = field(default_factory=list)
    merges: bool = True
    """Whether `Aggregate` succeeds at once."""
    stores: bool = True
    """Whether `FinishPart` succeeds at once."""

    def __post_init__(self) -> None:
        self.now = 100.0
        self.effects: list[CoordinatorEffect] = []
        self.parts: dict[bytes, bytes] = {}
        self.arriving: list[Arriving] = []
        self._count = 0
        self.boot()

    def boot(self) -> None:
        """Start the machine (again) from what was recorded."""
        self.machine = Coordinator(
            self.config,
            self.roster,
            self.history,
            signing_key=FEDERATION_SECRET,
            random_bytes=self._random,
            software="desk",
        )
        self._carry_out(self.machine.start(self.now))

    @property
    def history(self) -> History:
        history = History()
        for record in [*self.records, *self.arriving]:
            history = after(history, record)
        return history

    @property
    def open(self) -> OpenExchange:
        opened = self.history.open
        assert opened is not None
        return opened

    @property
    def task(self) -> TaskManifest:
        return self.open.manifest

    def handle(self, event: CoordinatorEvent) -> Effects:
        """All effects of an event, and of what followed from them."""
        start = len(self.effects)
        self._carry_out(self.machine.handle(event, self.now))
        return self.effects[start:]

    def wait(self, seconds: float) -> Effects:
        self.now += seconds
        return self.handle(Tick())

    def idle(self, seconds: float) -> None:
        """Let time go by while every site keeps in touch."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 5.0)
            for site in self.config.sites:
                self.say(site, Sync(b""))
        self.wait(0.0)

    def say(self, site: str, message: FromSite, body: bytes = b"", route: bytes = b"") -> list[FromCoordinator]:
        """What the coordinator answers to the connection that spoke."""
        route = route or site.encode()
        effects = self.handle_say(site, message, body, route)
        return [effect.message for effect in effects if isinstance(effect, Send) and effect.route == route]

    def handle_say(self, site: str, message: FromSite, body: bytes = b"", route: bytes = b"") -> Effects:
        """All effects of what a site says."""
        return self.handle(Received(site, route or site.encode(), message, body))

    def join(self, *sites: str, route: bytes = b"") -> None:
        for site in sites:
            (challenge,) = self.say(site, Open(PROTOCOL_VERSION, "test"), route=route)
            assert isinstance(challenge, Challenge)
            self.say(site, self.hello(site, challenge.nonce), route=route)

    def hello(self, site: str, nonce: bytes, *, protocol: int = PROTOCOL_VERSION, key: str = "") -> Hello:
        payload = hello_payload(nonce, "demo", site, curve(site), protocol)
        return Hello(nonce, sign(secret(key or site), HELLO_CONTEXT, payload))

    def result(self, site: str, arrays: Arrays | None = None) -> tuple[UploadManifest, bytes]:
        """What a site would return for the open task."""
        model: Arrays = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        made = arrays if arrays is not None else train(site, self.task, model, self.config.plan)
        manifest, raw = blob(made, self.config.wire.dtype if self.task.kind in ("init", "train") else "float32")
        upload = UploadManifest(self.open.task, site, 12, (("loss", 0.5),), manifest, public_half(secret(site)))
        return upload, raw

    def offer(self, site: str, manifest: UploadManifest, *, key: str = "") -> list[FromCoordinator]:
        body = manifest.pack()
        return self.say(site, offer_of(manifest, key or site), body)

    def send(self, site: str, manifest: UploadManifest, raw: bytes) -> list[FromCoordinator]:
        """The answers to the chunks of an upload that has credit for all of them."""
        answers = []
        for at in range(0, len(raw), CHUNK_BYTES):
            answers += self.say(site, *self.chunk(manifest, raw, at))
        return answers

    def chunk(self, manifest: UploadManifest, raw: bytes, at: int) -> tuple[Chunk, bytes]:
        """One chunk of an upload as its site sends it."""
        seal = Seal.of_site(manifest, secret(manifest.site), self.task.seal_key)
        size = manifest.blob.chunk(at)[0]
        return Chunk(hashlib.sha256(manifest.pack()).digest(), at), seal.close(at, raw[at : at + size])

    def commit(self, *sites: str) -> None:
        """Let sites do the open task."""
        for site in sites:
            manifest, raw = self.result(site)
            self.offer(site, manifest)
            self.send(site, manifest, raw)

    def to_train(self) -> None:
        """Bring the federation to its first round of training."""
        self.join(*self.config.sites)
        self.commit(*self.task.cohort)
        assert self.task.kind == "train"

    def to_train_without_merging(self) -> None:
        """Stop where the first weights are committed, but not yet merged."""
        self.join(*self.config.sites)
        self.commit(*self.task.cohort)

    def do(self) -> TaskManifest:
        """Let the whole cohort do the open task, and return its manifest."""
        task = self.task
        self.commit(*task.cohort)
        return task

    def _random(self, count: int) -> bytes:
        self._count += 1
        return hashlib.sha256(self._count.to_bytes(8, "big")).digest()[:count]

    def _carry_out(self, effects: list[CoordinatorEffect]) -> None:
        self.effects += effects
        for effect in effects:
            match effect:
                case RecordOpened() | RecordClosed():
                    self.records.append(effect)
                case WritePart(part, at, data):
                    self.parts[part] = self.parts.get(part, b"")[:at] + bytes(data)
                case SyncPart(part, at, upload, site, signature):
                    secret = self.open.secret
                    last = at - CHUNK_BYTES
                    sealed = self.parts[part][sealed_at(upload.blob, last) :][: CHUNK_BYTES + TAG_BYTES]
                    tail = Seal.of_exchange(upload, secret).open(last, sealed)[-7:]
                    self.arriving = [Arriving(site, part, upload, signature, at, tail)]
                case FinishPart(part, _, UploadManifest() as upload, site) if self.stores:
                    self.records.append(Update(site, part, upload))
                    self._carry_out(self.machine.handle(Stored(part), self.now))
                case Aggregate(task) if self.merges:
                    self._carry_out(self.machine.handle(Aggregated(task, merged(effect)), self.now))
                case _:
                    pass


def merged(effect: Aggregate) -> BlobManifest:
    """The first update stands for the mean of all; a bank is any float table."""
    return effect.updates[0].manifest.blob


def offer_of(manifest: UploadManifest, key: str) -> Offer:
    body = manifest.pack()
    return Offer(hashlib.sha256(body).digest(), sign(secret(key), UPLOAD_CONTEXT, body))


def code_of(answers: list[FromCoordinator]) -> str:
    """The code of the one refusal among the answers."""
    (refusal,) = [one for one in answers if isinstance(one, Refuse)]
    return refusal.code


def with_nan(arrays: Arrays, name: str) -> Arrays:
    spoilt = {key: array.copy() for key, array in arrays.items()}
    spoilt[name].flat[-1] = math.nan
    return spoilt
