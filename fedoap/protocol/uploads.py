"""The uploads under way at the coordinator: who holds credit, what each has sent, what to answer.

At most `at_once` uploads hold credit, each for one window of at most 32 chunks, so what can be on its way to
the coordinator is bounded whatever the number of sites. A site has one upload at a time. It survives a
broken connection: offered again, it goes on at the byte expected next. It survives a restart, too, and goes
on where it was last made durable.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedoap import transfer
from fedoap.errors import RefusedError, SealError
from fedoap.manifests import NO_KEY, UploadManifest
from fedoap.messages import Chunk, Commit, Credit, Go, Wait
from fedoap.protocol.events import (
    Arriving,
    CoordinatorEffect,
    DropPart,
    FinishPart,
    Note,
    OpenPart,
    Send,
    SyncPart,
    WritePart,
)
from fedoap.seal import Seal, sealed_at
from fedoap.transfer import Admission, Receiver

STALL_SECONDS = 30.0
"""An upload that stood still for so long makes room if others wait; it keeps what has arrived."""


@dataclass(slots=True)
class Upload:
    """One site's result on its way in."""

    site: str
    id: bytes
    manifest: UploadManifest
    signature: bytes
    route: bytes
    receiver: Receiver
    moved_at: float
    state: Literal["waiting", "receiving", "finishing"] = "waiting"
    is_open: bool = False
    durable: int = 0
    """The byte at which it would go on after a restart."""
    asked_at: int = field(default=-1)
    """The byte last asked for because of a gap: the rest of that window is not answered again."""


class Uploads:
    """What is on its way in, by site."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._admission = Admission(at_once)
        self._of: dict[str, Upload] = {}
        self._secret = NO_KEY

    def begin(self, secret: bytes) -> None:
        """Take uploads that are sealed for the exchange of this secret from now on."""
        self._secret = secret

    def find(self, site: str) -> Upload | None:
        """Return the site's upload."""
        return self._of.get(site)

    def named(self, upload: bytes) -> Upload | None:
        """Return the upload of this id."""
        return next((one for one in self._of.values() if one.id == upload), None)

    def resume(self, arriving: Arriving, now: float) -> None:
        """Know of an upload that was under way before a restart; it goes on once its site offers it again."""
        manifest, at = arriving.manifest, arriving.at
        receiver = self._receiver(manifest, at, arriving.tail)
        upload, signature = arriving.upload, arriving.signature
        self._of[arriving.site] = Upload(arriving.site, upload, manifest, signature, b"", receiver, now, durable=at)

    def offer(
        self, manifest: UploadManifest, upload: bytes, signature: bytes, route: bytes, now: float
    ) -> list[CoordinatorEffect]:
        """Take up a checked offer, or go on with it, and return the answer.

        Raises:
            RefusedError: this connection is already sending another result, or this one's seal is no key.
        """
        site, receiver = manifest.site, self._receiver(manifest)
        effects = self._give_way(site, upload, route)
        one = self._of.get(site)
        if one is None:
            one = Upload(site, upload, manifest, signature, route, receiver, now)
            self._of[site] = one
        if one.route != route:
            one.route = route
            one.receiver.withdraw()  # it was the old connection's
        if one.state == "finishing":
            return [*effects, Send(route, Wait(upload))]
        if not self._admission.enter(site):
            return [*effects, Send(route, Wait(upload))]
        return [*effects, *_admit(one, now)]

    def chunk(self, site: str, message: Chunk, body: memoryview, now: float) -> list[CoordinatorEffect]:
        """Return what becomes of a chunk of this site's upload: written, known already, or asked for again.

        Raises:
            RefusedError: it is not what the manifest says, or not finite; the upload stays as it was.
        """
        one = self._of[site]
        if one.state != "receiving":
            return [Send(one.route, Wait(one.id))]
        match one.receiver.take(message.at, body, now):
            case "new":
                one.moved_at = now
                written = WritePart(one.id, sealed_at(one.manifest.blob, message.at), body)
                return [
                    written,
                    *([_finish(one)] if one.receiver.is_complete else [*_checkpoint(one), _credit(one, now)]),
                ]
            case "repeated":
                return [Send(one.route, Credit(one.id, one.receiver.upto))]
            case "gap":
                return _mind_the_gap(one)

    def end(self, site: str, now: float, *, drop: bool = True) -> list[CoordinatorEffect]:
        """Forget a site's upload, and return the word to those whose turn it is now."""
        one = self._of.pop(site, None)
        if one is None:
            return []
        dropped: list[CoordinatorEffect] = [DropPart(one.id)] if drop and _has_part(one) else []
        return [*dropped, *self._admit_all(self._admission.leave(site), now)]

    def stored(self, one: Upload, now: float) -> list[CoordinatorEffect]:
        """Forget an upload that is durable, say so to its site, and return the word to who is next."""
        return [Send(one.route, Commit(one.id)), *self.end(one.site, now, drop=False)]

    def clear(self) -> list[CoordinatorEffect]:
        """Forget all: their exchange is over. One that is being finished is left to the disk."""
        effects: list[CoordinatorEffect] = [DropPart(one.id) for one in self._of.values() if _has_part(one)]
        self._of.clear()
        self._admission = Admission(self._at_once)
        return effects

    def keep(self) -> list[CoordinatorEffect]:
        """Make all that has arrived durable: the coordinator is about to end."""
        under_way = [one for one in self._of.values() if one.is_open and one.state != "finishing"]
        return [_sync(one) for one in under_way if one.receiver.at > one.durable]

    def make_room(self, now: float) -> list[CoordinatorEffect]:
        """Let an upload that stands still wait behind the others."""
        effects: list[CoordinatorEffect] = []
        for one in list(self._of.values()):
            stalled = one.state == "receiving" and now - one.moved_at >= STALL_SECONDS
            if stalled and self._admission.crowded:
                one.receiver.withdraw()
                one.state = "waiting"
                turn = self._admission.leave(one.site)
                self._admission.enter(one.site)
                effects += [Send(one.route, Wait(one.id)), *self._admit_all(turn, now)]
        return effects

    def _receiver(self, manifest: UploadManifest, at: int = 0, tail: bytes = b"") -> Receiver:
        try:
            seal = Seal.of_exchange(manifest, self._secret) if manifest.blob.size else None
        except SealError as error:
            raise RefusedError("malformed", str(error)) from None
        return Receiver(manifest.blob, at=at, tail=tail, seal=seal)

    def _give_way(self, site: str, upload: bytes, route: bytes) -> list[CoordinatorEffect]:
        one = self._of.get(site)
        if one is None or one.id == upload:
            return []
        if one.route == route or one.state == "finishing":
            raise RefusedError("duplicate", f"another result of site {site} is already on its way")
        # a site that came back with another result has lost the first, and will never send the rest of it
        del self._of[site]
        return [DropPart(one.id)] if _has_part(one) else []

    def _admit_all(self, sites: Sequence[str], now: float) -> list[CoordinatorEffect]:
        return [effect for site in sites for effect in _admit(self._of[site], now)]


def _admit(one: Upload, now: float) -> list[CoordinatorEffect]:
    blob = one.manifest.blob
    opened = OpenPart(one.id, sealed_at(blob, blob.size), one.receiver.at)
    effects: list[CoordinatorEffect] = [] if one.is_open else [opened]
    if not one.is_open and one.receiver.at:
        effects.append(Note("upload_resumed", {"site": one.site, "at": one.receiver.at, "bytes": blob.size}))
    one.is_open, one.asked_at = True, -1
    if one.state == "waiting":
        one.state, one.moved_at = "receiving", now
    if one.receiver.is_complete:  # nothing but metrics
        return [*effects, _finish(one)]
    return [*effects, Send(one.route, Go(one.id, one.receiver.at, one.receiver.grant(now)))]


def _finish(one: Upload) -> FinishPart:
    one.state = "finishing"
    return FinishPart(one.id, one.manifest.blob, one.manifest, one.site, one.signature)


def _checkpoint(one: Upload) -> list[CoordinatorEffect]:
    step = transfer.CHECKPOINT_CHUNKS * one.manifest.blob.chunk_bytes
    return [_sync(one)] if one.receiver.at - one.durable >= step else []


def _sync(one: Upload) -> SyncPart:
    one.durable = one.receiver.at
    return SyncPart(one.id, one.durable, one.manifest, one.site, one.signature)


def _credit(one: Upload, now: float) -> Send:
    return Send(one.route, Credit(one.id, one.receiver.grant(now)))


def _mind_the_gap(one: Upload) -> list[CoordinatorEffect]:
    if one.asked_at == one.receiver.at:
        return []
    one.asked_at = one.receiver.at
    return [Send(one.route, Go(one.id, one.receiver.at, one.receiver.upto))]


def _has_part(one: Upload) -> bool:
    return (one.is_open or one.durable > 0) and one.state != "finishing"
