"""From a task and the uploads that count to the job of the aggregation process.

The daemon and `verify` make it here, so that both merge the same files in the same way. Here alone is
known where a committed upload lies and how it is read.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from fedoap.config import BlobFiles, Plan
from fedoap.tensors import BlobManifest, TaskManifest, UploadManifest
from fedoap_coordinator.aggregator import MergeBase, MergeJob, MergeUpdate
from fedoap_coordinator.blobs import blob_files, exact_files


def merge_job(task: TaskManifest, uploads: Iterable[UploadManifest], plan: Plan, state: Path, output: Path) -> MergeJob:
    """Return the job that makes a task's result out of uploads that lie in a state folder."""
    return MergeJob(
        kind=task.kind,
        plan=plan,
        updates=tuple(stored_upload(state, one) for one in uploads),
        model=MergeBase(files=_original(state, task.model)) if task.model else None,
        bank=MergeBase(files=blob_files(state, task.bank.id)) if task.bank else None,
        output=output,
    )


def stored_upload(state: Path, upload: UploadManifest) -> MergeUpdate:
    """Return where a committed upload lies."""
    return MergeUpdate(blob=blob_files(state, upload.blob.id).blob, upload=upload.pack().hex())


def read_upload(upload: MergeUpdate, at: int, size: int) -> bytes:
    """Return bytes [at, at + size) of a committed upload, fewer where it ends early.

    Raises:
        FileNotFoundError: it is gone.
    """
    with upload.blob.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, at)


def _original(state: Path, model: BlobManifest) -> BlobFiles:
    exact = exact_files(state, model.id)
    return exact if exact.blob.exists() else blob_files(state, model.id)
