"""A named set of tensors <-> a manifest (names, dtypes, shapes, chunk hashes) and raw bytes.

On disk and on the wire a set of tensors is one blob: the tensors' little-endian bytes, one after the
other in the order of their names. The manifest says what lies where, and its SHA-256 is the blob's
name, so a name fixes every byte. Nothing here knows torch: bfloat16 is `uint16` bits with a label.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, TypeAlias, cast, get_args

import msgpack
import numpy as np
from numpy.typing import NDArray

from fedoap.errors import TensorsError
from fedoap.messages import CHUNK_BYTES

MANIFEST_VERSION = 1
HASH_BYTES = 32
MOST_PACKED_BYTES = CHUNK_BYTES + CHUNK_BYTES // 256 + 64
"""What zstd makes at most of a chunk that cannot be compressed."""
WRITE_BACK_BYTES = 8 << 20
"""After so many bytes a file that is to be durable begins to go to the disk."""
NO_KEY = bytes(32)
"""Stands for no X25519 key: no secret agrees with it on anything, so nothing can be sealed for it."""
Dtype: TypeAlias = Literal["float32", "bfloat16", "int64"]
ITEM_BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "int64": 8}
TaskKind: TypeAlias = Literal["init", "seed", "bank", "train", "calibrate"]
"""`init` makes the first weights, `seed` the first bank, `bank` refreshes it, `calibrate` sends metrics only."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor's place in a blob."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Packing:
    """How a blob is packed as its difference from another, `base`: the bytes that each of its chunks takes."""

    base: bytes
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class BlobManifest:
    """What a blob holds, and the SHA-256 of each chunk of the bytes that travel: its own, or packed ones."""

    tensors: tuple[TensorSpec, ...]
    hashes: bytes
    chunk_bytes: int = CHUNK_BYTES
    packing: Packing | None = None

    @cached_property
    def size(self) -> int:
        """Bytes that travel and lie on a disk."""
        return self.plain_size if self.packing is None else sum(self.packing.sizes)

    @cached_property
    def plain_size(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.size for spec in self.tensors)

    @cached_property
    def id(self) -> bytes:
        """The blob's name: SHA-256 of the packed manifest."""
        return hashlib.sha256(self.pack()).digest()

    def chunk(self, at: int) -> tuple[int, bytes]:
        """Return length and SHA-256 of the chunk that starts at byte `at`, a multiple of `chunk_bytes`."""
        index = at // self.chunk_bytes
        return min(self.chunk_bytes, self.size - at), self.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]

    def pack(self) -> bytes:
        """Return the canonical bytes."""
        rows = [[spec.name, spec.dtype, list(spec.shape)] for spec in self.tensors]
        plain = {"v": MANIFEST_VERSION, "tensors": rows, "chunk": self.chunk_bytes, "sha256": self.hashes}
        packed = {"base": self.packing.base, "sizes": list(self.packing.sizes)} if self.packing else {}
        return _pack(plain | packed)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the manifest that `pack` wrote.

        Raises:
            TensorsError: it has another form, or its numbers do not fit each other.
        """
        match _unpack(data, "manifest"):
            case {"v": 1, "tensors": list(rows), "chunk": int(chunk), "sha256": bytes(hashes), **rest}:
                manifest = cls(tuple(_spec(row) for row in rows), hashes, chunk, _packing(rest))
            case _:
                raise TensorsError("manifest: keys or types are not those of version 1")
        names = [spec.name for spec in manifest.tensors]
        if names != sorted(set(names)):
            raise TensorsError("manifest: names must be sorted and occur once")
        if chunk != CHUNK_BYTES or len(hashes) != HASH_BYTES * -(-manifest.size // chunk):
            what = "packed tensors" if manifest.packing else "tensors"
            raise TensorsError(f"manifest: {len(hashes)} bytes of hashes do not fit {manifest.size} bytes of {what}")
        if manifest.packing and len(manifest.packing.sizes) != -(-manifest.plain_size // chunk):
            packed, size = len(manifest.packing.sizes), manifest.plain_size
            raise TensorsError(f"manifest: {packed} packed chunks do not fit {size} bytes of tensors")
        return manifest

    def offsets(self) -> Iterator[tuple[TensorSpec, int]]:
        """Yield each tensor with the byte at which it starts."""
        at = 0
        for spec in self.tensors:
            yield spec, at
            at += spec.size


@dataclass(frozen=True, slots=True)
class TaskManifest:
    """A task as the coordinator signs it: everything that a site needs, and everything an update is bound to."""

    federation: str
    plan: bytes
    kind: TaskKind
    round: int
    attempt: int
    cohort: tuple[str, ...]
    deadline_seconds: int
    model: BlobManifest | None = None
    bank: BlobManifest | None = None
    seal_key: bytes = NO_KEY
    """Public half of the exchange's own key, which uploads are sealed for (`fedoap.seal`)."""

    @property
    def work(self) -> bytes:
        """Names what is to be done, whatever the attempt: work once done for it need not be done again."""
        parts = [self.kind, self.round, _id(self.model), _id(self.bank), self.plan]
        return hashlib.sha256(_pack(parts)).digest()

    @property
    def blobs(self) -> tuple[BlobManifest, ...]:
        """What a site must have before it can start."""
        return tuple(blob for blob in (self.model, self.bank) if blob is not None)

    def pack(self) -> bytes:
        """Return the canonical bytes; their SHA-256 is the task's name."""
        return _pack(
            {
                "v": MANIFEST_VERSION,
                "federation": self.federation,
                "plan": self.plan,
                "kind": self.kind,
                "round": self.round,
                "attempt": self.attempt,
                "cohort": list(self.cohort),
                "deadline": self.deadline_seconds,
                "model": self.model.pack() if self.model else b"",
                "bank": self.bank.pack() if self.bank else b"",
                "seal": self.seal_key,
            }
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the manifest that `pack` wrote.

        Raises:
            TensorsError: it has another form.
        """
        match _unpack(data, "task"):
            case {
                "v": 1,
                "federation": str(federation),
                "plan": bytes(plan),
                "kind": str(kind),
                "round": int(number),
                "attempt": int(attempt),
                "cohort": list(cohort),
                "deadline": int(deadline),
                "model": bytes(model),
                "bank": bytes(bank),
                "seal": bytes(seal),
                **rest,
            } if not rest and kind in get_args(TaskKind) and all(isinstance(name, str) for name in cohort):
                if len(seal) != len(NO_KEY):
                    raise TensorsError(f"task: the seal's key has {len(seal)} bytes, but must have {len(NO_KEY)}")
                base, slots = (BlobManifest.unpack(blob) if blob else None for blob in (model, bank))
                step = cast(TaskKind, kind), number, attempt
                return cls(federation, plan, *step, tuple(cohort), deadline, base, slots, seal)
            case _:
                raise TensorsError("task: keys or types are not those of version 1")


@dataclass(frozen=True, slots=True)
class UploadManifest:
    """One site's result of one task, as the site signs it; `blob` may hold no tensor at all."""

    task: bytes
    site: str
    cases: int
    metrics: tuple[tuple[str, float], ...]
    blob: BlobManifest
    seal_key: bytes = NO_KEY
    """Public half of the upload's own key (`fedoap.seal`); none where there is no tensor to seal."""

    def pack(self) -> bytes:
        """Return the canonical bytes; their SHA-256 is the upload's name."""
        return _pack(
            {
                "v": MANIFEST_VERSION,
                "task": self.task,
                "site": self.site,
                "cases": self.cases,
                "metrics": dict(self.metrics),
                "blob": self.blob.pack(),
                "seal": self.seal_key,
            }
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the manifest that `pack` wrote.

        Raises:
            TensorsError: it has another form, or a metric is no finite number.
        """
        match _unpack(data, "upload"):
            case {
                "v": 1,
                "task": bytes(task),
                "site": str(site),
                "cases": int(cases),
                "metrics": dict(metrics),
                "blob": bytes(blob),
                "seal": bytes(seal),
                **rest,
            } if not rest and cases >= 0 and len(seal) == len(NO_KEY):
                if not all(isinstance(value, float) and math.isfinite(value) for value in metrics.values()):
                    raise TensorsError("upload: a metric is not a finite number")
                if not all(isinstance(name, str) and 0 < len(name) <= 64 for name in metrics):
                    raise TensorsError("upload: a metric's name must have 1 to 64 characters")
                return cls(task, site, cases, tuple(metrics.items()), BlobManifest.unpack(blob), seal)
            case _:
                raise TensorsError("upload: keys or types are not those of version 1")


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


def _packing(rest: Mapping[object, object]) -> Packing | None:
    match rest:
        case {"base": bytes(base), "sizes": list(sizes), **more} if not more and len(base) == HASH_BYTES:
            if all(type(size) is int and 0 < size <= MOST_PACKED_BYTES for size in sizes):
                return Packing(base, tuple(sizes))
            raise TensorsError(f"manifest: a packed chunk must have 1 to {MOST_PACKED_BYTES} bytes")
        case _ if rest:
            raise TensorsError("manifest: keys or types are not those of version 1")
    return None


def _spec(row: object) -> TensorSpec:
    match row:
        case [str(name), "float32" | "bfloat16" | "int64" as dtype, list(shape)]:
            if all(type(n) is int and 0 <= n < 2**40 for n in shape) and 0 < len(name) < 256 and len(shape) <= 8:
                return TensorSpec(name, dtype, tuple(shape))
    raise TensorsError("manifest: a tensor's row must be [name, float32 | bfloat16 | int64, shape]")


def _id(blob: BlobManifest | None) -> bytes:
    return blob.id if blob else b""


def _pack(value: object) -> bytes:
    return msgpack.packb(value, use_bin_type=True)  # type: ignore[no-any-return]


def _unpack(data: bytes, what: str) -> object:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise TensorsError(f"{what}: not msgpack of the allowed form: {type(error).__name__}") from None
