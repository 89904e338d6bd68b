"""Runs the aggregation process and takes its result over."""

import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedoap.config import Plan
from fedoap.errors import StorageError
from fedoap.protocol.events import Aggregate, Aggregated, AggregateFailed
from fedoap.tensors import BlobManifest
from fedoap_coordinator.aggregator import BLAME, BLOB, MASTER, RESULT, MergeBase, MergeJob, MergeResult, MergeUpdate
from fedoap_coordinator.store import Made, Store

STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Running:
    task: bytes
    folder: Path
    process: subprocess.Popen[bytes]


class Merging:
    """At most one aggregation process at a time, in a folder of its own; leftovers of an earlier run are gone."""

    def __init__(self, state: Path, store: Store, plan: Plan) -> None:
        self._folder, self._store, self._plan = state / "merge", store, plan
        self._running: _Running | None = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)

    @property
    def busy(self) -> bool:
        """Whether a process is at work."""
        return self._running is not None

    def start(self, effect: Aggregate) -> Aggregated | None:
        """Begin to merge; what has no tensors to merge is answered at once."""
        self.stop()
        if effect.manifest.kind == "calibrate":
            return Aggregated(effect.task, None)
        # A fresh name each time: the orphan of a killed daemon must not write where its successor works.
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        (folder / "job.json").write_text(self._job(effect, folder).model_dump_json())
        with (folder / "errors").open("wb") as errors:
            command = [sys.executable, "-m", "fedoap_coordinator.aggregator", str(folder / "job.json")]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors)
        _hand_over(process, effect.secret)
        self._running = _Running(effect.task, folder, process)
        return None

    def poll(self) -> Aggregated | AggregateFailed | None:
        """Return how the process ended, once it has; its result is then in the store."""
        job = self._running
        if job is None or job.process.poll() is None:
            return None
        self._running = None
        try:
            if job.process.returncode:
                reason = _last_line(job.folder / "errors", job.process.returncode)
                return AggregateFailed(job.task, reason, _blamed(job.folder / BLAME))
            return Aggregated(job.task, self._take_over(job.folder))
        finally:
            shutil.rmtree(job.folder)

    def stop(self) -> None:
        """End the process if there is one; its work is lost."""
        job, self._running = self._running, None
        if job is None:
            return
        job.process.terminate()
        try:
            job.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
        shutil.rmtree(job.folder)

    def _job(self, effect: Aggregate, folder: Path) -> MergeJob:
        manifest, files = effect.manifest, self._store.files
        updates = tuple(
            MergeUpdate(blob=self._store.blobs.files(one.upload).blob, upload=one.manifest.pack().hex())
            for one in effect.updates
        )
        return MergeJob(
            kind=manifest.kind,
            plan=self._plan,
            updates=updates,
            model=MergeBase(files=files(manifest.model, exact=True)) if manifest.model else None,
            bank=MergeBase(files=files(manifest.bank)) if manifest.bank else None,
            output=folder,
        )

    def _take_over(self, folder: Path) -> BlobManifest:
        try:
            result = MergeResult.model_validate_json((folder / RESULT).read_bytes())
        except (OSError, ValueError) as error:
            raise StorageError(f"{folder / RESULT}: the aggregation left no result: {error}") from None
        manifest = BlobManifest.unpack(bytes.fromhex(result.blob))
        master = BlobManifest.unpack(bytes.fromhex(result.master)) if result.master else None
        self._store.publish(Made(manifest, folder / BLOB, (folder / MASTER, master) if master else None))
        return manifest


def _hand_over(process: subprocess.Popen[bytes], secret: bytes) -> None:
    """Give the secret through a pipe: it is on no command line and in no further file."""
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # why it ended so early is said elsewhere
        pipe.write(secret)


def _blamed(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _last_line(path: Path, code: int) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"the aggregation process ended with code {code}")[:400]
