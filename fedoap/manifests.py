"""What travels, in words: tables of tensors with the hashes of their chunks, tasks and results, as they are signed.

A blob is a set of tensors in one run of bytes (`fedoap.tensors`). Its manifest says what lies where, and the
manifest's SHA-256 is the blob's name, so a name fixes every byte. A task's or a result's manifest holds those of its
blobs and all else that it is bound to.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self, TypeAlias, cast, get_args

import msgpack

from fedoap.errors import TensorsError
from fedoap.messages import CHUNK_BYTES

MANIFEST_VERSION = 1
HASH_BYTES = 32
MOST_PACKED_BYTES = CHUNK_BYTES + CHUNK_BYTES // 256 + 64
"""The most that zstd makes of a chunk that cannot be compressed."""
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
            TensorsError: it has another form, its numbers do not fit each other, or `pack` writes other bytes.
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
        _check_canonical(manifest.pack(), data, "manifest")
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
            TensorsError: it has another form, or `pack` writes other bytes.
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
                manifest = cls(federation, plan, *step, tuple(cohort), deadline, base, slots, seal)
                _check_canonical(manifest.pack(), data, "task")
                return manifest
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
            TensorsError: it has another form, a metric is no finite number, or `pack` writes other bytes.
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
            } if not rest and type(cases) is int and cases >= 0 and len(seal) == len(NO_KEY):
                if not all(isinstance(value, float) and math.isfinite(value) for value in metrics.values()):
                    raise TensorsError("upload: a metric is not a finite number")
                if not all(_is_name(name, 64) for name in metrics):
                    raise TensorsError("upload: a metric's name must have 1 to 64 printable characters")
                manifest = cls(task, site, cases, tuple(metrics.items()), BlobManifest.unpack(blob), seal)
                _check_canonical(manifest.pack(), data, "upload")
                return manifest
            case _:
                raise TensorsError("upload: keys or types are not those of version 1")


def _check_canonical(packed: bytes, data: bytes, what: str) -> None:
    """Return if the bytes are the canonical ones: a manifest goes by their hash, and is packed anew to be stored."""
    if packed != data:
        raise TensorsError(f"{what}: its bytes are not the canonical ones")


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
            if all(type(n) is int and 0 <= n < 2**40 for n in shape) and len(shape) <= 8 and _is_name(name, 255):
                return TensorSpec(name, dtype, tuple(shape))
    raise TensorsError("manifest: a tensor's row must be [name, float32 | bfloat16 | int64, shape]")


def _is_name(name: object, most: int) -> bool:
    """Return whether something is a short text that may go to a terminal."""
    return isinstance(name, str) and 0 < len(name) <= most and name.isprintable()


def _id(blob: BlobManifest | None) -> bytes:
    return blob.id if blob else b""


def _pack(value: object) -> bytes:
    return msgpack.packb(value, use_bin_type=True)  # type: ignore[no-any-return]


def _unpack(data: bytes, what: str) -> object:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise TensorsError(f"{what}: not msgpack of the allowed form: {type(error).__name__}") from None
