"""A finished result on its way to the coordinator: offered again until it is committed or refused."""

import hashlib

from fedoap.identity import UPLOAD_CONTEXT, sign
from fedoap.manifests import UploadManifest
from fedoap.messages import Credit, Go, Offer
from fedoap.protocol.events import Say, SayChunk, SiteEffect
from fedoap.transfer import Range, Sender

FIRST_PAUSE_SECONDS = 3.0
LONGEST_PAUSE_SECONDS = 60.0
WAIT_SECONDS = 5.0
"""Until an upload that has to wait for others is offered again."""
PATIENCE_SECONDS = 30.0
"""After this long without a word on bytes under way the offer is repeated; a slow link needs that for one chunk."""
MOST_CORRUPT = 3
"""A kept result whose bytes have failed to match its own manifest this often is damaged."""


class Offering:
    """One upload; keeps no bytes, only where they are."""

    def __init__(self, upload: UploadManifest, signing_key: bytes, now: float) -> None:
        self._body = upload.pack()
        self.id = hashlib.sha256(self._body).digest()
        self._signature = sign(signing_key, UPLOAD_CONTEXT, self._body)
        self._blob = upload.blob
        self._sender = Sender(upload.blob)
        self._offer_at, self._pause = now, FIRST_PAUSE_SECONDS
        self._corrupt = 0

    def rekey(self, signing_key: bytes) -> None:
        """Sign the manifest anew; its hash, and so the bytes sent already, stay good."""
        self._signature = sign(signing_key, UPLOAD_CONTEXT, self._body)

    def due(self, now: float) -> list[SiteEffect]:
        """Return the offer, where it is time to say it (again)."""
        if now < self._offer_at:
            return []
        self._offer_at = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return [Say(Offer(self.id, self._signature), self._body)]

    def go(self, message: Go, now: float) -> list[SiteEffect]:
        """Return the chunks from where the coordinator wants them."""
        self._offer_at = now + PATIENCE_SECONDS
        return self._chunks(self._sender.go(message.at, message.upto))

    def credit(self, message: Credit, now: float) -> list[SiteEffect]:
        """Return the chunks that more credit lets through."""
        self._offer_at = now + PATIENCE_SECONDS
        return self._chunks(self._sender.credit(message.upto))

    def wait(self, now: float) -> None:
        """Offer again a little later: others are ahead."""
        self._sender.pause()
        self._offer_at = now + WAIT_SECONDS

    def put_off(self, now: float) -> None:
        """Offer again after a growing pause: the coordinator's disk is full."""
        self._sender.pause()
        self._offer_at = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)

    def offer_now(self, now: float) -> None:
        """Ask at once how the upload stands."""
        self._offer_at = min(self._offer_at, now)

    def restart(self, now: float) -> None:
        """Offer anew on a fresh connection: credit of the old one is gone."""
        self._sender.pause()
        self._offer_at, self._pause = now, FIRST_PAUSE_SECONDS

    def is_damaged(self, now: float) -> bool:
        """Note that bytes did not match the manifest, and return whether that happened too often."""
        self._corrupt += 1
        self.put_off(now)
        return self._corrupt >= MOST_CORRUPT

    def _chunks(self, ranges: list[Range]) -> list[SiteEffect]:
        return [SayChunk(self.id, self._blob.id, at, size) for at, size in ranges]
