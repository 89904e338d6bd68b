"""The one process that does arithmetic on the sites' updates: `python -m fedoap_coordinator.aggregator`.

Each line of its standard input gives the secret that opens a job's updates, as hexadecimal digits, and names
its `MergeJob`'s file. It leaves durable blob files and, last and atomically, a `MergeResult` in `job.output`,
then writes the job's name to standard output; it ends when its input does. It holds no socket, no other key
and no ledger; the daemon takes its files over. At the first job that cannot be done it ends with exit code 2:
the last line of standard error says what is wrong, and the file `BLAME`, if there is one, names the site whose
update is to blame.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from fedoap.aggregation import merge_models, published
from fedoap.bank import merge_bank
from fedoap.blobfile import ByteSource, convert
from fedoap.config import BlobFiles, Plan
from fedoap.errors import FedoapError, StorageError, UpdateError
from fedoap.fields import Frozen
from fedoap.heap import keep_freed_memory
from fedoap.manifests import BlobManifest, TaskKind, UploadManifest
from fedoap.packing import MOST_KEPT, PackedUpdate
from fedoap.seal import SealedFile
from fedoap.server import first_moments
from fedoap.strategies import server_of

RESULT = "result.json"
BLOB = "result.blob"
MASTER = "master.blob"
BLAME = "blame"


class MergeUpdate(Frozen):
    """One site's upload: where its tensors lie, sealed, and the packed `UploadManifest` as hexadecimal digits."""

    blob: Path
    upload: str


class MergeBase(Frozen):
    """A blob that the result is made from; `manifest` is a file as the store writes it."""

    files: BlobFiles

    @property
    def pair(self) -> tuple[Path, BlobManifest]:
        """Return path and manifest."""
        return self.files.blob, BlobManifest.unpack(self.files.manifest.read_bytes())


class MergeJob(Frozen):
    """What is to be merged; all paths are absolute."""

    kind: TaskKind
    plan: Plan
    updates: tuple[MergeUpdate, ...]
    model: MergeBase | None = None
    """The float32 weights that the sites started from, and the server optimizer's moments if there are any."""
    sent: MergeBase | None = None
    """The same weights as they were published, which packed updates are packed against."""
    bank: MergeBase | None = None
    output: Path


class MergeResult(Frozen):
    """Packed manifests, as hexadecimal digits, of what lies in the output folder."""

    blob: str
    master: str = ""
    """Of what the coordinator keeps to itself, where it is more than the blob: the float32 original of a blob
    that is rounded to the wire's dtype, and the server optimizer's moments."""


def merge(job: MergeJob, secret: bytes | None) -> MergeResult:
    """Write the result's blobs into the job's folder and return their manifests.

    Without a secret the updates lie there as they are: nobody seals what never leaves a process.

    Raises:
        FedoapError: an update cannot be merged.
    """
    manifests = [UploadManifest.unpack(bytes.fromhex(one.upload)) for one in job.updates]
    updates = [(_opened(one.blob, of, secret), of) for one, of in zip(job.updates, manifests, strict=True)]
    blob, master = job.output / BLOB, job.output / MASTER
    match job.kind:
        case "seed" | "bank":
            bank = merge_bank(job.kind, updates, job.bank.pair if job.bank else None, job.plan, blob)
            return MergeResult(blob=bank.pack().hex())
        case "init":
            (source, first), *_ = updates
            convert(source, first.blob, blob, job.plan.wire.dtype)
            if job.plan.wire.dtype == "float32":
                return MergeResult(blob=first.blob.pack().hex())
            exact = convert(source, first.blob, master, "float32")
            return MergeResult(blob=first.blob.pack().hex(), master=exact.pack().hex())
        case "train" if job.model:
            models = _unpacked(updates, job)
            if job.plan.wire.dtype == "float32" and not first_moments(server_of(job.plan.strategy)):
                return MergeResult(blob=merge_models(models, job.model.pair, job.plan.strategy, blob).pack().hex())
            exact = merge_models(models, job.model.pair, job.plan.strategy, master)
            sent = published(master, exact, blob, job.plan.wire.dtype)
            return MergeResult(blob=sent.pack().hex(), master=exact.pack().hex())
        case _:
            raise StorageError(f"aggregation: {job.kind} without a model makes no result")


def _opened(path: Path, upload: UploadManifest, secret: bytes | None) -> Path | SealedFile:
    return path if secret is None else SealedFile(path, upload, secret)


def _unpacked(
    updates: Sequence[tuple[Path | SealedFile, UploadManifest]], job: MergeJob
) -> Sequence[tuple[Path | ByteSource, UploadManifest]]:
    """Return the updates as they are read: those that are packed as what they stand for."""
    if all(upload.blob.packing is None for _, upload in updates):
        return updates
    if job.sent is None:
        raise StorageError(f"aggregation: {job.kind} has packed updates, but no model that they are packed against")
    base, keeps = job.sent.pair, len(updates) <= MOST_KEPT
    return [
        (PackedUpdate(path, upload, base, keeps=keeps) if upload.blob.packing else path, upload)
        for path, upload in updates
    ]


def main(path: Path, secret: bytes) -> None:
    """Do the job that the file describes; its result is durable when this returns."""
    job = MergeJob.model_validate_json(path.read_bytes())
    try:
        result = merge(job, secret)
    except UpdateError as error:
        (job.output / BLAME).write_text(error.site)
        raise
    for name in (BLOB, MASTER):
        _sync(job.output / name)
    draft = job.output / f".{RESULT}"
    draft.write_text(result.model_dump_json())
    _sync(draft)
    draft.replace(job.output / RESULT)


def _sync(path: Path) -> None:
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def serve(jobs: Iterable[str]) -> None:
    """Do one job after the other, and say after each that it is done."""
    for line in jobs:
        secret, _, path = line.removesuffix("\n").partition(" ")
        main(Path(path), bytes.fromhex(secret))
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    keep_freed_memory()
    try:
        serve(sys.stdin)
    except (FedoapError, OSError, ValidationError) as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        sys.exit(2)
