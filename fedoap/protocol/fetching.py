"""The blobs that a site needs for its task: fetched one after the other, each until it is durable."""

from collections.abc import Iterable, Mapping

from fedoap.errors import RefusedError
from fedoap.manifests import BlobManifest
from fedoap.messages import Data, Get
from fedoap.protocol.events import DropPart, FinishPart, KeepBlobs, Note, OpenPart, Say, SiteEffect, WritePart
from fedoap.transfer import Fetcher

RETRY_SECONDS = 10.0
"""Until a download that the disk refused is tried again."""


class Fetching:
    """What the site has, what it still wants, and the download under way."""

    def __init__(self, have: Iterable[bytes], partly: Mapping[bytes, int]) -> None:
        self._have, self._partly = set(have), dict(partly)
        self._wanted: list[BlobManifest] = []
        self._fetcher: Fetcher | None = None
        self._not_before = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether all that is wanted is here."""
        return not self._wanted

    def want(self, blobs: Iterable[BlobManifest]) -> list[SiteEffect]:
        """Want these from now on, and nothing else; a download that still serves goes on."""
        missing = {blob.id: blob for blob in blobs if blob.id not in self._have}
        self._wanted = list(missing.values())
        if self._fetcher is None or self._fetcher.blob.id in missing:
            return []
        dropped = DropPart(self._fetcher.blob.id)
        self._fetcher = None
        return [dropped]

    def keep(self, blobs: Iterable[BlobManifest]) -> list[SiteEffect]:
        """Count on these only, and have all others deleted."""
        kept = frozenset(blob.id for blob in blobs)
        if kept >= self._have | self._partly.keys():
            return []
        self._have &= kept
        self._partly = {blob: at for blob, at in self._partly.items() if blob in kept}
        return [KeepBlobs(kept)]

    def restart(self, now: float) -> None:
        """Ask anew for what was on its way on a connection that is gone."""
        if self._fetcher is not None:
            self._fetcher.restart(now)

    def due(self, now: float) -> list[SiteEffect]:
        """Return what to ask for now."""
        effects: list[SiteEffect] = []
        if self._fetcher is None and self._wanted and now >= self._not_before:
            effects += self._begin(self._wanted[0], now)
        if self._fetcher is None or self._fetcher.is_complete:
            return effects
        self._fetcher.restart_if_quiet(now)
        blob = self._fetcher.blob.id
        return [*effects, *[Say(Get(blob, at, upto)) for at, upto in self._fetcher.ask(now)]]

    def data(self, message: Data, body: memoryview, now: float) -> list[SiteEffect]:
        """Return what becomes of a chunk; one that is not the next changes nothing."""
        fetcher = self._fetcher
        if fetcher is None or fetcher.blob.id != message.blob:
            return []
        try:
            is_next = fetcher.take(message.at, body, now)
        except RefusedError as error:
            return [Note("download_refused", {"code": error.code, "reason": str(error)})]
        if not is_next:
            return []
        written = WritePart(message.blob, message.at, body)
        return [written, FinishPart(message.blob, fetcher.blob)] if fetcher.is_complete else [written]

    def stored(self, blob: bytes) -> None:
        """Note that the download under way is durable."""
        if self._fetcher is None or self._fetcher.blob.id != blob:
            return
        self._fetcher = None
        self._have.add(blob)
        self._wanted = [one for one in self._wanted if one.id != blob]

    def failed(self, blob: bytes, reason: str, now: float) -> list[SiteEffect]:
        """Try again later what the disk refused."""
        if self._fetcher is None or self._fetcher.blob.id != blob:
            return []
        self._fetcher = None
        self._not_before = now + RETRY_SECONDS
        return [Note("download_failed", {"reason": reason})]

    def _begin(self, blob: BlobManifest, now: float) -> list[SiteEffect]:
        at = self._partly.pop(blob.id, 0)
        self._fetcher = Fetcher(blob, now, at=at)
        opened = OpenPart(blob.id, blob.size, at, blob)
        return [opened, FinishPart(blob.id, blob)] if self._fetcher.is_complete else [opened]
