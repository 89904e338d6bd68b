"""From a task and the uploads that count to the job of the aggregation process.

The daemon and `verify` make it here, so that both merge the same files in the same way. Nothing else knows
where a committed upload lies.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fedoap.config import BlobFiles, Plan
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap_coordinator.aggregator import MergeBase, MergeJob, MergeUpdate
from fedoap_coordinator.blobs import blob_files, exact_files


def merge_job(task: TaskManifest, uploads: Iterable[UploadManifest], plan: Plan, state: Path, output: Path) -> MergeJob:
    """Return the job that makes a task's result out of uploads that lie in a state folder."""
    return MergeJob(
        kind=task.kind,
        plan=plan,
        updates=tuple(stored_upload(state, one) for one in uploads),
        model=MergeBase(files=_original(state, task.model)) if task.model else None,
        sent=MergeBase(files=blob_files(state, task.model.id)) if task.model else None,
        bank=MergeBase(files=blob_files(state, task.bank.id)) if task.bank else None,
        output=output,
    )


def stored_upload(state: Path, upload: UploadManifest) -> MergeUpdate:
    """Return where a committed upload lies."""
    return MergeUpdate(blob=upload_files(state, upload).blob, upload=upload.pack().hex())


def upload_files(state: Path, upload: UploadManifest) -> BlobFiles:
    """Return where a committed upload and its manifest lie."""
    return blob_files(state, hashlib.sha256(upload.pack()).digest())


def _original(state: Path, model: BlobManifest) -> BlobFiles:
    exact = exact_files(state, model.id)
    return exact if exact.blob.exists() else blob_files(state, model.id)
