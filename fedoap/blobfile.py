"""Blobs on disk in pieces: read from any value on, written to the end, in bounded memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedoap.errors import TensorsError
from fedoap.manifests import ITEM_BYTES, BlobManifest, Dtype, TensorSpec
from fedoap.tensors import ChunkHashes, as_float32, begin_write_back, bfloat16_bits, open_to_overwrite, write_all

SLICE_VALUES = 1 << 18
"""Values that are in memory at once: a chunk of float32, 2 MiB as float64."""


class BlobWriter:
    """Writes a blob piece by piece, in bounded memory; `manifest` is there once it is closed.

    Tensors must begin in the order of their names. A blob that is left by an error is deleted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_to_overwrite(path)
        self._specs: list[TensorSpec] = []
        self._hashes = ChunkHashes()
        self._written = 0

    def begin(self, spec: TensorSpec) -> None:
        """Say what the next bytes are."""
        assert not self._specs or self._specs[-1].name < spec.name, spec.name
        self._specs.append(spec)

    def write(self, values: NDArray[np.float32]) -> None:
        """Append values in the current tensor's dtype."""
        narrow = self._specs[-1].dtype == "bfloat16"
        raw = bfloat16_bits(values) if narrow else np.ascontiguousarray(values, "<f4")
        self.write_raw(raw.view(np.uint8).data)

    def write_raw(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._hashes.add(data)
        write_all(self._file, data)
        self._written = begin_write_back(self._file.fileno(), self._written, self._written + len(data))

    @property
    def manifest(self) -> BlobManifest:
        """The manifest of what was written."""
        assert self._file.closed
        return BlobManifest(tuple(self._specs), self._hashes.all())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            self._file.truncate(self._written)
        if kind is not None:
            self._path.unlink(missing_ok=True)


class ByteSource(Protocol):
    """Bytes of a blob that are not simply those of a file: sealed ones, packed ones."""

    def read(self, at: int, size: int) -> bytes:
        """Return plain bytes [at, at + size)."""
        ...


class BlobReader:
    """A blob on disk that is read in pieces; no descriptor stays open, however many sites there are.

    Values go by their number over all tensors, in the order of the blob: a piece need not end with a tensor,
    so that pieces can begin where sealed chunks do, and each chunk is opened once.
    """

    def __init__(self, path: Path | ByteSource, manifest: BlobManifest) -> None:
        if isinstance(path, Path) and path.stat().st_size != manifest.plain_size:
            size = path.stat().st_size
            raise TensorsError(f"{path}: file has {size} bytes, but its manifest says {manifest.plain_size}")
        self._path, self._manifest = path, manifest
        self._runs = _runs(manifest)

    @property
    def values(self) -> int:
        """How many there are."""
        return self._runs[-1].stop if self._runs else 0

    def tensors(self) -> Iterator[tuple[TensorSpec, int, int]]:
        """Yield each tensor, the number of its first value, and how many it has."""
        first = 0
        for spec in self._manifest.tensors:
            count = spec.size // ITEM_BYTES[spec.dtype]
            yield spec, first, count
            first += count

    def name(self, value: int) -> str:
        """Return the name of the tensor that holds a value."""
        return next(spec.name for spec, first, count in self.tensors() if first <= value < first + count)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return values [start, stop), which are floats."""
        pieces = [as_float32(raw, dtype) for raw, dtype in self._pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def raw(self, start: int, stop: int) -> bytes:
        """Return the bytes of values [start, stop)."""
        return b"".join(raw for raw, _ in self._pieces(start, stop))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[bytes, Dtype]]:
        for run in self._runs:
            low, high = max(start, run.start), min(stop, run.stop)
            if low < high:
                item = ITEM_BYTES[run.dtype]
                yield read_piece(self._path, run.at + (low - run.start) * item, (high - low) * item), run.dtype


def read_piece(path: Path | ByteSource, at: int, wanted: int) -> bytes:
    """Return bytes [at, at + wanted) of a file, or of what stands for one.

    Raises:
        TensorsError: the file ends before.
    """
    if not isinstance(path, Path):
        return path.read(at, wanted)
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), wanted, at)
    if len(data) != wanted:
        raise TensorsError(f"{path}: ends before byte {at + wanted}, but its size was right a moment ago")
    return data


@dataclass(frozen=True, slots=True)
class _Run:
    """Values [start, stop) of neighbouring tensors of one dtype, and the byte at which they begin."""

    start: int
    stop: int
    dtype: Dtype
    at: int


def _runs(manifest: BlobManifest) -> list[_Run]:
    runs, value, at = [], 0, 0
    for dtype, specs in groupby(manifest.tensors, key=lambda spec: spec.dtype):
        size = sum(spec.size for spec in specs)
        runs.append(_Run(value, value + size // ITEM_BYTES[dtype], dtype, at))
        value, at = runs[-1].stop, at + size
    return runs


def convert(path: Path | ByteSource, manifest: BlobManifest, output: Path, dtype: Dtype) -> BlobManifest:
    """Write a blob anew with its floats as `dtype` and return the new manifest; whole numbers stay as they are.

    Raises:
        TensorsError: the file's size is not the manifest's, or `dtype` is no float.
    """
    if dtype == "int64":
        raise TensorsError(f"{path}: floats cannot be converted to int64")
    source = BlobReader(path, manifest)
    with BlobWriter(output) as writer:
        for spec, first, count in source.tensors():
            kind = spec.dtype if spec.dtype == "int64" else dtype
            writer.begin(TensorSpec(spec.name, kind, spec.shape))
            for start, stop in slices(count, SLICE_VALUES, first):
                if kind == "int64":
                    writer.write_raw(source.raw(start, stop))
                else:
                    writer.write(source.read(start, stop))
    return writer.manifest


def without(path: Path, manifest: BlobManifest, prefix: str, output: Path) -> BlobManifest:
    """Write a blob anew without the tensors whose names start so and return the new manifest.

    Raises:
        TensorsError: the file's size is not the manifest's.
    """
    source = BlobReader(path, manifest)
    with BlobWriter(output) as writer:
        for spec, first, count in source.tensors():
            if not spec.name.startswith(prefix):
                writer.begin(spec)
                for start, stop in slices(count, SLICE_VALUES, first):
                    writer.write_raw(source.raw(start, stop))
    return writer.manifest


def slices(count: int, values: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of slices of `values`, at most, that make up `count` values from the first on."""
    end = first + count
    return ((start, min(start + values, end)) for start in range(first, end, values))
