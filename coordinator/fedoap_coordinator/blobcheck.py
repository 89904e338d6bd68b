"""Blobs on disk held against their manifests, chunk by chunk, and results made anew from their inputs."""

import hashlib
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from fedoap.config import BlobFiles, Plan
from fedoap.errors import FedoapError, IdentityError, UpdateError
from fedoap.manifests import NO_KEY, BlobManifest, TaskManifest, UploadManifest
from fedoap.seal import SealedFile
from fedoap_coordinator.aggregator import MergeResult, merge
from fedoap_coordinator.jobs import merge_job, upload_files
from fedoap_coordinator.seals import seal_file, secret_of


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
        Gone: they, or the key of their seal, are not there.
    """
    files, blob = upload_files(state, upload), upload.blob
    yield from check_manifest(files.manifest, upload)
    try:
        secret = secret_of(state, upload.task)
    except IdentityError as error:
        yield str(error)
        return
    if secret is None:
        raise Gone(str(seal_file(state, upload.task)))
    try:
        sealed = SealedFile(files.blob, upload, secret)
        for at in range(0, blob.size, blob.chunk_bytes):
            yield from _check_sealed(files.blob, sealed, blob, at)
    except OSError as error:
        yield _unread(files.blob, error)
    except FedoapError as error:
        yield f"{files.blob}: {error}"


def check_manifest(path: Path, manifest: BlobManifest | UploadManifest) -> Iterator[str]:
    """Yield a fault if a manifest's file is not exactly the manifest.

    Raises:
        Gone: there is none.
    """
    try:
        written = path.read_bytes()
    except OSError as error:
        yield _unread(path, error)
        return
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
    given = tuple(uploads)
    secret = secret_of(state, given[0].task) if given else None
    with tempfile.TemporaryDirectory(prefix="fedoap-verify-") as folder:
        made: MergeResult = merge(merge_job(task, given, plan, state, Path(folder)), secret or NO_KEY)
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
    except OSError as error:
        yield _unread(path, error)


def _unread(path: Path, error: OSError) -> str:
    """Return the fault of a file that the system does not read.

    Raises:
        Gone: it is not there.
    """
    if isinstance(error, FileNotFoundError):
        raise Gone(str(path)) from None
    return f"{path}: cannot be read: {error.strerror}"


def _check_sealed(path: Path, sealed: SealedFile, blob: BlobManifest, at: int) -> Iterator[str]:
    size, wanted = blob.chunk(at)
    where = f"{path}: chunk {at // blob.chunk_bytes} (bytes {at} to {at + size}, {_tensor(blob, at)})"
    try:
        if hashlib.sha256(sealed.read(at, size)).digest() != wanted:
            yield f"{where} is not what its manifest says"
    except UpdateError:
        yield f"{where} does not open: its sealed bytes were altered"


def _tensor(manifest: BlobManifest, at: int) -> str:
    """Return the tensor of the byte at `at`; of packed bytes, the one that their chunk begins with."""
    if manifest.packing:
        at = bisect_right(list(accumulate(manifest.packing.sizes)), at) * manifest.chunk_bytes
    name = ""
    for spec, start in manifest.offsets():
        if start <= at:
            name = spec.name
    return f"tensor {name}"
