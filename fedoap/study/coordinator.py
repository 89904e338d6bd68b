"""The coordinator of a federation in one process: its real machine and merge, without port, ledger and seals.

Blobs lie where its daemon keeps them, so that the daemon's own job for a merge finds them. Those of sites do
not travel: where the machine asks for room for an upload, the file is linked, and has arrived.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedoap.config import BlobFiles, FederationConfig, ModelRecord
from fedoap.errors import UpdateError
from fedoap.identity import Roster
from fedoap.manifests import BlobManifest, TaskManifest
from fedoap.protocol.coordinator import Coordinator
from fedoap.protocol.events import (
    Aggregate,
    Aggregated,
    AggregateFailed,
    Answered,
    CoordinatorEffect,
    CoordinatorEvent,
    OpenPart,
    RecordClosed,
    RecordOpened,
    Send,
    Stored,
)
from fedoap.protocol.history import BANK_KINDS, MODEL_KINDS, History
from fedoap.protocol.status import Status
from fedoap.study.posts import Post, ToCoordinator, ToSite
from fedoap_coordinator.aggregator import BLOB, MASTER, MergeResult, merge
from fedoap_coordinator.blobs import BLOBS, blob_files, exact_files
from fedoap_coordinator.jobs import merge_job
from fedoap_coordinator.reports import write_model
from fedoap_node.files import remove, share


@dataclass(frozen=True, slots=True)
class Keys:
    """Throw-away keys of a federation that no network sees: the federation's own, and who its members are."""

    signing_key: bytes
    roster: Roster
    random_bytes: Callable[[int], bytes]


class StudyCoordinator:
    """Runs the machine and carries out its effects; a site's address is its name.

    `uploads` says where the tensors of an upload lie, by the upload's id: nothing where it has none.
    """

    def __init__(
        self, config: FederationConfig, keys: Keys, state: Path, uploads: Callable[[bytes], Path | None]
    ) -> None:
        self._plan, self._state, self._uploads = config.plan, state, uploads
        self._machine = Coordinator(
            config,
            keys.roster,
            History(),
            signing_key=keys.signing_key,
            random_bytes=keys.random_bytes,
            software="study",
        )
        self._task: TaskManifest | None = None
        self._model: tuple[int, bytes] | None = None
        self._bank: bytes | None = None
        (state / BLOBS).mkdir(parents=True)

    def start(self, now: float) -> list[Post]:
        """Return what is to happen first."""
        return self._carry_out(self._machine.start(now))

    def handle(self, event: CoordinatorEvent, now: float) -> list[Post]:
        """Return what is to happen because of one event."""
        return self._carry_out(self._machine.handle(event, now))

    def status(self) -> Status:
        """Return how the federation stands."""
        return self._machine.status()

    def files(self, blob: bytes) -> BlobFiles:
        """Return where a published blob lies."""
        return blob_files(self._state, blob)

    def export(self, folder: Path) -> ModelRecord:
        """Write the newest shared model and bank to a folder."""
        assert self._model is not None, "a federation that has finished has a model"
        number, model = self._model
        bank = self.files(self._bank) if self._bank else None
        return write_model(folder, ModelRecord(plan=self._plan, round=number, shared=self.files(model), bank=bank))

    def _carry_out(self, effects: list[CoordinatorEffect]) -> list[Post]:
        return [post for effect in effects for post in self._do(effect)]

    def _do(self, effect: CoordinatorEffect) -> list[Post]:
        match effect:
            case Send(route, message, body):
                return [ToSite(route.decode(), Answered(message, body))]
            case OpenPart(part):
                self._take(part)
                return [ToCoordinator(Stored(part))]
            case RecordOpened():
                self._task = effect.manifest
            case RecordClosed():
                self._close(effect)
            case Aggregate():
                return [ToCoordinator(self._merge(effect))]
            case _:  # notes, and what becomes of bytes that do not travel
                pass
        return []

    def _take(self, upload: bytes) -> None:
        path = self._uploads(upload)
        if path is not None:
            share(path, self.files(upload).blob)

    def _merge(self, effect: Aggregate) -> Aggregated | AggregateFailed:
        folder = self._state / "merge"
        folder.mkdir()
        uploads = [one.manifest for one in effect.updates]
        try:
            made = merge(merge_job(effect.manifest, uploads, self._plan, self._state, folder), None)
            return Aggregated(effect.task, self._publish(made, folder))
        except UpdateError as error:
            return AggregateFailed(effect.task, str(error), error.site)
        finally:
            shutil.rmtree(folder)

    def _publish(self, made: MergeResult, folder: Path) -> BlobManifest:
        blob = BlobManifest.unpack(bytes.fromhex(made.blob))
        if made.master:
            exact = BlobManifest.unpack(bytes.fromhex(made.master))
            _adopt(folder / MASTER, exact, exact_files(self._state, blob.id))
        _adopt(folder / BLOB, blob, self.files(blob.id))
        return blob

    def _close(self, closed: RecordClosed) -> None:
        task, result = self._task, closed.result
        assert task is not None, "an exchange closes after it was opened"
        if result is not None and task.kind in MODEL_KINDS:
            self._model = task.round, result.id
        if result is not None and task.kind in BANK_KINDS:
            self._bank = result.id
        kept = {blob.hex() for blob in (self._model and self._model[1], self._bank) if blob}
        for path in (self._state / BLOBS).iterdir():
            if path.name.partition(".")[0] not in kept:
                remove(path)


def _adopt(source: Path, manifest: BlobManifest, target: BlobFiles) -> None:
    target.manifest.write_bytes(manifest.pack())
    source.replace(target.blob)
