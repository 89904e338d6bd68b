"""Blobs on disk held against their manifests, chunk by chunk, and results made anew from their inputs."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fedoap.config import BlobFiles, Plan
from fedoap.errors import FedoapError
from fedoap.tensors import BlobManifest, TaskManifest, UploadManifest
from fedoap_coordinator.aggregator import MergeResult, merge
from fedoap_coordinator.jobs import merge_job, read_upload, stored_upload


class Gone(Exception):  # noqa: N818 - no error where a coordinator at work has just deleted the file
    """A file is not there; the text names it."""


def check_blob(files: BlobFiles, manifest: BlobManifest) -> Iterator[str]:
    """Yield what is wrong with a blob and with the manifest beside it.

    Raises:
        Gone: one of the two is not there.
    """
    yield from check_manifest(files.manifest, manifest)

    def read(at: int, size: int) -> bytes:
        with files.blob.open("rb") as file:
            file.seek(at)
            return file.read(size)

    yield from _check_chunks(files.blob, manifest, read)


def check_upload(state: Path, upload: UploadManifest) -> Iterator[str]:
    """Yield what is wrong with a committed upload's tensors.

    Raises:
        Gone: they are not there.
    """
    one = stored_upload(state, upload)
    yield from check_manifest(one.blob.with_name(f"{one.blob.name}.manifest"), upload.blob)
    yield from _check_chunks(one.blob, upload.blob, lambda at, size: read_upload(one, at, size))


def check_manifest(path: Path, manifest: BlobManifest) -> Iterator[str]:
    """Yield a fault if a manifest's file is not exactly the manifest.

    Raises:
        Gone: there is none.
    """
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        raise Gone(str(path)) from None
    if written != manifest.pack():
        yield f"{path}: is not the manifest of that name"


def remake(
    task: TaskManifest, uploads: Iterable[UploadManifest], plan: Plan, state: Path
) -> tuple[BlobManifest, BlobManifest | None]:
    """Return the manifests of the result that follows from the uploads, and of its float32 original if it is rounded.

    Raises:
        FedoapError: the uploads make no result.
        FileNotFoundError: an input is not there.
    """
    with tempfile.TemporaryDirectory(prefix="fedoap-verify-") as folder:
        made: MergeResult = merge(merge_job(task, uploads, plan, state, Path(folder)))
    exact = BlobManifest.unpack(bytes.fromhex(made.master)) if made.master else None
    return BlobManifest.unpack(bytes.fromhex(made.blob)), exact


def first_difference(one: BlobManifest, other: BlobManifest) -> str:
    """Return in words where two blobs of different names begin to differ."""
    if one.tensors != other.tensors:
        return "their tables of tensors differ"
    for at in range(0, one.size, one.chunk_bytes):
        if one.chunk(at) != other.chunk(at):
            return f"they differ from chunk {at // one.chunk_bytes} on, which holds {_tensor(one, at)}"
    return "their manifests differ"


def said(error: Exception) -> str:
    """Return an error's text as part of a line."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, FedoapError) else repr(error)


def _check_chunks(path: Path, manifest: BlobManifest, read: Callable[[int, int], bytes]) -> Iterator[str]:
    try:
        for at in range(0, manifest.size, manifest.chunk_bytes):
            size, wanted = manifest.chunk(at)
            data = read(at, size)
            if hashlib.sha256(data).digest() != wanted:
                index = at // manifest.chunk_bytes
                short = f", of which {size - len(data)} are missing" if len(data) < size else ""
                where = f"chunk {index} (bytes {at} to {at + size}{short}, {_tensor(manifest, at)})"
                yield f"{path}: {where} is not what its manifest says"
        if read(manifest.size, 1):
            yield f"{path}: is longer than the {manifest.size} bytes that its manifest says"
    except FileNotFoundError:
        raise Gone(str(path)) from None


def _tensor(manifest: BlobManifest, at: int) -> str:
    """Return the tensor that the byte at `at` belongs to."""
    name = ""
    for spec, start in manifest.offsets():
        if start <= at:
            name = spec.name
    return f"tensor {name}"
