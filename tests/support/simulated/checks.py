"""What must hold after every step of every world; written without the code that it checks."""

import hashlib

from federation_builders import CHUNK_BYTES
from fedoap.config import FederationConfig
from fedoap.manifests import BlobManifest
from fedoap.messages import Chunk, Commit, Credit, FromCoordinator, FromSite, Go, Task
from fedoap.pace import MOST_CHUNKS
from fedoap.protocol.coordinator import Coordinator
from fedoap.protocol.events import Aggregate, RecordClosed, RecordOpened, Update
from fedoap.seal import TAG_BYTES


def is_intact(manifest: BlobManifest, raw: bytes) -> bool:
    """Return whether the bytes are those that the manifest names."""
    chunks = (raw[at : at + manifest.chunk_bytes] for at in range(0, len(raw), manifest.chunk_bytes))
    return len(raw) == manifest.size and b"".join(hashlib.sha256(one).digest() for one in chunks) == manifest.hashes


class Checks:
    """The invariants, told of every message and every record."""

    def __init__(self, config: FederationConfig) -> None:
        self._config = config
        self._credit: dict[tuple[bytes, bytes], int] = {}
        self._open: RecordOpened | None = None
        self._durable: dict[bytes, Update] = {}
        self._model: BlobManifest | None = None
        self._done: list[tuple[str, int]] = []
        self._counted: set[bytes] = set()
        self._tainted: set[bytes] = set()
        """Updates under a key that was revoked before they were first merged."""
        self._merged: set[bytes] = set()

    def sent(self, header: bytes, body: bytes) -> None:
        assert b"personal." not in header + body, "a personal parameter's name occurs in a message"

    def site_hears(self, route: bytes, message: FromCoordinator) -> None:
        if isinstance(message, Go | Credit):
            key = (route, message.upload)
            whole = -(-message.upto // CHUNK_BYTES) * CHUNK_BYTES  # a flipped bit may end it within a chunk
            self._credit[key] = max(whole, self._credit.get(key, 0))

    def coordinator_says(self, message: FromCoordinator) -> None:
        match message:
            case Commit(upload):
                assert upload in self._durable, "an upload was committed that is not durable"
            case Task(task):
                assert self._open is not None, "a task was sent that is not on record"
                assert self._open.task == task, "a task was sent that is not on record"
            case _:
                pass

    def site_says(self, route: bytes, message: FromSite, size: int) -> None:
        if isinstance(message, Chunk):
            credit = self._credit.get((route, message.upload), 0)
            assert message.at + size - TAG_BYTES <= credit, "a site sent more than it had credit for"

    def merging(self, effect: Aggregate) -> None:
        self._merged.add(effect.task)
        sites = [update.site for update in effect.updates]
        assert sites == sorted(set(sites)), "an update was counted twice, or out of order"
        assert len(sites) >= (1 if effect.manifest.kind == "init" else self._config.quorum), "merged without a quorum"
        for update in effect.updates:
            assert update.upload in self._durable, "an update was counted that is not durable"
            assert update.manifest.task == effect.task, "an update of another task was counted"
            assert update.upload not in self._tainted, "an update counts though its key was revoked"

    def revoked(self, names: list[str]) -> None:
        mine = [one for one in self._durable.values() if one.site in names]
        self._tainted |= {one.upload for one in mine if one.manifest.task not in self._merged}

    def recorded(self, record: RecordOpened | Update | RecordClosed) -> None:
        match record:
            case RecordOpened():
                assert self._open is None, "an exchange was opened while another was open"
                assert record.manifest.model == self._model, "a task does not go by the published model"
                self._open = record
            case Update():
                assert self._open is not None, "an update was recorded while no exchange was open"
                assert record.manifest.task == self._open.task, "an update of another task was recorded"
                twice = any(one.site == record.site for one in self._recorded(record.manifest.task))
                assert not twice, "two updates of one site were recorded for one task"
                self._durable[record.upload] = record
            case RecordClosed():
                self._closed(record)

    def _recorded(self, task: bytes) -> list[Update]:
        return [one for one in self._durable.values() if one.manifest.task == task]

    def _closed(self, record: RecordClosed) -> None:
        opened, self._open = self._open, None
        assert opened is not None, "an exchange was closed that was not open"
        assert opened.task == record.task, "an exchange was closed that was not open"
        sites = [self._durable[upload].site for upload in record.counted]
        assert len(set(sites)) == len(sites), "an update was counted twice"
        assert not self._counted & set(record.counted), "an update was counted in two exchanges"
        self._counted |= set(record.counted)
        if record.outcome == "done":
            step = opened.manifest.kind, opened.manifest.round
            assert step not in self._done, "a step was done twice"
            self._done.append(step)
            self._model = record.result if opened.manifest.kind in ("init", "train") else self._model

    def credit_is_bounded(self, coordinator: Coordinator, chunk_bytes: int) -> None:
        uploads = coordinator._rounds.uploads._of.values()
        open_bytes = [one.receiver.upto - one.receiver.at for one in uploads if one.receiver.upto > one.receiver.at]
        assert len(open_bytes) <= self._config.coordinator.uploads_at_once, "too many uploads hold credit"
        most = MOST_CHUNKS * chunk_bytes
        assert all(size <= most for size in open_bytes), "an upload holds more than one window of credit"
