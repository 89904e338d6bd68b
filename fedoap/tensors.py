"""A named set of tensors <-> its manifest and raw bytes.

On disk and on the wire a set of tensors is one blob: the tensors' little-endian bytes, one after the
other in the order of their names. The manifest (`fedoap.manifests`) says what lies where.
Nothing here knows torch: bfloat16 is `uint16` bits with a label.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedoap.errors import TensorsError
from fedoap.manifests import ITEM_BYTES, BlobManifest, Dtype, TensorSpec
from fedoap.messages import CHUNK_BYTES

WRITE_BACK_BYTES = 8 << 20
"""After this many bytes a file that is to be durable begins to go to the disk."""


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return values rounded to bfloat16, to nearest even, as bits; what is not finite stays so.

    >>> bfloat16_bits(np.array([1.0, -2.5], np.float32))
    array([16256, 49184], dtype=uint16)
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def float32_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_float32(raw: bytes | memoryview, dtype: Dtype) -> NDArray[np.float32]:
    """Return the float values of a piece of a float32 or bfloat16 tensor's bytes."""
    if dtype == "bfloat16":
        return float32_values(np.frombuffer(raw, "<u2"))
    return np.frombuffer(raw, "<f4")


def first_not_finite(piece: memoryview, dtype: Dtype) -> int | None:
    """Return the number of the first float that is not finite in a piece of a float32 or bfloat16 tensor's bytes."""
    if dtype == "bfloat16":
        finite = (np.frombuffer(piece, "<u2") & 0x7F80) != 0x7F80  # an exponent of ones: infinite or NaN
    else:
        finite = np.isfinite(np.frombuffer(piece, "<f4"))
    return None if finite.all() else int(np.argmin(finite))


class ChunkHashes:
    """The SHA-256 of each chunk of a blob whose bytes come by in order, in pieces of any length."""

    __slots__ = ("_filled", "_hash", "_hashes")

    def __init__(self) -> None:
        self._hashes: list[bytes] = []
        self._hash, self._filled = hashlib.sha256(), 0

    def add(self, data: bytes | memoryview) -> None:
        """Count the next bytes in."""
        view = memoryview(data)
        while view:
            piece = view[: CHUNK_BYTES - self._filled]
            self._hash.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == CHUNK_BYTES:
                self._end()

    def all(self) -> bytes:
        """Return the hashes, one after the other; the last chunk ends here."""
        if self._filled:
            self._end()
        return b"".join(self._hashes)

    def _end(self) -> None:
        self._hashes.append(self._hash.digest())
        self._hash, self._filled = hashlib.sha256(), 0


def write_blob(path: Path, tensors: Mapping[str, NDArray[np.generic]], dtype: Dtype = "float32") -> BlobManifest:
    """Write tensors to a blob file, floats as `dtype`, integers as int64, and return its manifest.

    A file that is there is written over, not emptied first, so that its place on the disk and in memory is used again.
    """
    specs, hashes, written = [], ChunkHashes(), 0
    with open_to_overwrite(path) as file:
        for name in sorted(tensors):
            array = np.asarray(tensors[name])
            kind: Dtype = dtype if np.issubdtype(array.dtype, np.floating) else "int64"
            specs.append(TensorSpec(name, kind, array.shape))
            for piece in _raw_pieces(array, kind):
                hashes.add(piece)  # written right after: it is still in the processor's cache
                write_all(file, piece)
                written = begin_write_back(file.fileno(), written, written + len(piece))
        file.truncate(written)
    return BlobManifest(tuple(specs), hashes.all())


def open_to_overwrite(path: Path) -> io.FileIO:
    """Open a file to be written from its start and cut to length at the end; what it holds until then is any bytes."""
    return io.FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "w")


def write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    """Write all of the data to an unbuffered file, which may take it in parts."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def begin_write_back(descriptor: int, before: int, now: int) -> int:
    """Let the disk begin with what was written between two offsets, at whole `WRITE_BACK_BYTES`, and return the second.

    Pages that are not on the disk yet cannot be dropped, so this advice only starts to write them, and the sync at
    the end, for which everything waits, has little left to do.
    """
    first, last = (offset - offset % WRITE_BACK_BYTES for offset in (before, now))
    if last > first:
        os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_DONTNEED)
    return now


def right_bytes(path: Path, blob: BlobManifest) -> int:
    """Return how many of a file's first bytes are those of the blob, in whole chunks."""
    if not blob.size:
        return 0
    with path.open("rb") as file:
        for at in range(0, blob.size, blob.chunk_bytes):
            size, digest = blob.chunk(at)
            if hashlib.sha256(file.read(size)).digest() != digest:
                return at
    return blob.size


def read_blob(path: Path, manifest: BlobManifest) -> dict[str, NDArray[np.generic]]:
    """Return a blob's tensors: float32 (bfloat16 widened) and int64.

    Raises:
        TensorsError: the file's size is not the manifest's.
    """
    size = path.stat().st_size
    if size != manifest.size:
        raise TensorsError(f"{path}: file has {size} bytes, but its manifest says {manifest.size}")
    with path.open("rb") as file:
        return _tensors(file.read, manifest)


def parse_blob(data: bytes, manifest: BlobManifest) -> dict[str, NDArray[np.generic]]:
    """Return the tensors of a blob's bytes: float32 (bfloat16 widened) and int64."""
    return _tensors(io.BytesIO(data).read, manifest)


def _tensors(read: Callable[[int], bytes], manifest: BlobManifest) -> dict[str, NDArray[np.generic]]:
    tensors: dict[str, NDArray[np.generic]] = {}
    for spec in manifest.tensors:
        raw = read(spec.size)
        values = np.frombuffer(raw, "<i8") if spec.dtype == "int64" else as_float32(raw, spec.dtype)
        tensors[spec.name] = values.reshape(spec.shape)
    return tensors


def _raw_pieces(array: NDArray[np.generic], dtype: Dtype) -> Iterator[memoryview]:
    """Yield a tensor's bytes, little-endian and in C order; what has that form already is not copied."""
    flat = array.reshape(-1)
    step = CHUNK_BYTES // ITEM_BYTES[dtype]
    for start in range(0, len(flat), step):
        piece = flat[start : start + step]
        if dtype == "int64":
            raw: NDArray[np.generic] = piece.astype("<i8", copy=False)
        else:
            values = piece.astype("<f4", copy=False)
            raw = bfloat16_bits(values) if dtype == "bfloat16" else values
        yield np.ascontiguousarray(raw).view(np.uint8).data
