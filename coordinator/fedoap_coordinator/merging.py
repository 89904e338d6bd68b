"""Runs the aggregation process and takes its results over.

The process is started for the first job and kept for those that follow, since its imports take as long
as merging a small model does. It is killed with a job that nobody wants any more, and ends by itself
when its standard input does, so none outlives the daemon by more than the job in hand.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedoap.config import Plan
from fedoap.errors import StorageError
from fedoap.manifests import BlobManifest
from fedoap.protocol.events import Aggregate, Aggregated, AggregateFailed
from fedoap_coordinator.aggregator import BLAME, BLOB, MASTER, RESULT, MergeResult
from fedoap_coordinator.jobs import merge_job
from fedoap_coordinator.store import Made, Store

STOP_SECONDS = 5.0
READ_BYTES = 1 << 12
READ_BACK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class _Running:
    task: bytes
    folder: Path
    process: subprocess.Popen[bytes]


class Merging:
    """At most one aggregation at a time, in a folder of its own; leftovers of an earlier run are gone."""

    def __init__(self, state: Path, store: Store, plan: Plan) -> None:
        self._state, self._folder, self._store, self._plan = state, state / "merge", store, plan
        self._running: _Running | None = None
        self._process: subprocess.Popen[bytes] | None = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        self._errors: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed with this object

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._running is not None

    def descriptors(self) -> list[int]:
        """Return what becomes readable when the job under way has ended."""
        return [_output(self._running.process)] if self._running else []

    def start(self, effect: Aggregate) -> Aggregated | None:
        """Begin to merge; what has no tensors to merge is answered at once."""
        self.stop()
        if effect.manifest.kind == "calibrate":
            return Aggregated(effect.task, None)
        # A fresh name each time: the orphan of a killed daemon must not write where its successor works.
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        uploads = [one.manifest for one in effect.updates]
        job = merge_job(effect.manifest, uploads, self._plan, self._state, folder)
        (folder / "job.json").write_text(job.model_dump_json())
        if effect.manifest.model:
            self._store.blobs.spares.take(folder / BLOB, effect.manifest.model.size)
        self._running = _Running(effect.task, folder, self._begin(folder / "job.json", effect.secret))
        return None

    def poll(self) -> Aggregated | AggregateFailed | None:
        """Return how the job ended, once it has; its result is then in the store."""
        job = self._running
        if job is None:
            return None
        with suppress(BlockingIOError):
            os.read(_output(job.process), READ_BYTES)  # only to be woken by the next line
        is_done = (job.folder / RESULT).exists()
        if not is_done and job.process.poll() is None:
            return None
        self._running = None
        try:
            if not is_done:
                reason = _reason(self._errors, job.process.returncode)
                return AggregateFailed(job.task, reason, _blamed(job.folder / BLAME))
            return Aggregated(job.task, self._take_over(job.folder))
        finally:
            shutil.rmtree(job.folder)

    def stop(self) -> None:
        """End the job under way if there is one; its work is lost, and so is its process."""
        job, self._running = self._running, None
        if job is not None:
            self._end_process()
            shutil.rmtree(job.folder)

    def close(self) -> None:
        """End the job and the process."""
        self.stop()
        self._end_process()
        self._errors.close()

    def _begin(self, job: Path, secret: bytes) -> "subprocess.Popen[bytes]":
        process = self._process
        if process is None or process.poll() is not None:
            self._end_process()
            process = self._process = self._launch()
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has just died: `poll` will see that
            # the secret goes through a pipe: it is on no command line and in no further file
            process.stdin.write(f"{secret.hex()} ".encode() + os.fsencode(job) + b"\n")
            process.stdin.flush()
        return process

    def _launch(self) -> "subprocess.Popen[bytes]":
        self._errors.seek(0)
        self._errors.truncate()
        command = [sys.executable, "-m", "fedoap_coordinator.aggregator"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        os.set_blocking(_output(process), False)
        return process

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _take_over(self, folder: Path) -> BlobManifest:
        try:
            result = MergeResult.model_validate_json((folder / RESULT).read_bytes())
        except (OSError, ValueError) as error:
            raise StorageError(f"{folder / RESULT}: the aggregation left no result: {error}") from None
        manifest = BlobManifest.unpack(bytes.fromhex(result.blob))
        master = BlobManifest.unpack(bytes.fromhex(result.master)) if result.master else None
        self._store.publish(Made(manifest, folder / BLOB, (folder / MASTER, master) if master else None))
        return manifest


def _blamed(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _output(process: "subprocess.Popen[bytes]") -> int:
    assert process.stdout is not None
    return process.stdout.fileno()


def _reason(errors: IO[bytes], code: int) -> str:
    if code < 0:
        return f"the aggregation process was ended by signal {-code} ({signal.strsignal(-code)})"
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - READ_BACK_BYTES))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"the aggregation process ended with code {code}")[:400]
