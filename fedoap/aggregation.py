"""Streaming merge of the sites' weights, and conversion between wire dtypes.

Blobs are read slice by slice with `pread` and never as a whole, one site after the other, so memory
depends neither on the model's size nor on the number of sites: a rule that must see all sites' values
at once gets slices that are the shorter the more sites there are. Sums are float64 and run over the
sites in the order of their names, or over sorted values: every element sees the same operations
whatever the slices are, so the bits of the result depend only on the set of updates. Whole numbers
have no mean: a model with an int64 tensor is refused.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedoap.config import StrategyConfig
from fedoap.errors import TensorsError, UpdateError
from fedoap.messages import CHUNK_BYTES
from fedoap.robust import median, outlier, trimmed_mean
from fedoap.seal import SealedFile
from fedoap.tensors import ITEM_BYTES, BlobManifest, Dtype, TensorSpec, UploadManifest, as_float32, bfloat16_bits

SLICE_VALUES = 1 << 19
"""Values of a tensor that are in memory at once: 4 MiB as float64."""
MATRIX_SLICES = 4
"""So many slices of float32 values hold those of all sites together, for rules that sort them: 8 MiB."""


def merge_models(
    updates: Sequence[tuple[Path | SealedFile, UploadManifest]],
    base: tuple[Path, BlobManifest],
    strategy: StrategyConfig,
    output: Path,
    *,
    slice_values: int = SLICE_VALUES,
) -> BlobManifest:
    """Write base + server_learning_rate * (mean of the updates - base) as float32 and return its manifest.

    With another `strategy.rule` the median or trimmed mean stands in the mean's place (`fedoap.robust`).
    The mean is weighted as `strategy.weighting` says (McMahan et al. 2017, arXiv:1602.05629, and for
    rates other than 1 the pseudo-gradient of Reddi et al. 2021, arXiv:2003.00295). It is computed as
    (1 - rate) * base + rate * mean: at a rate of 1 that is the mean to the last bit.

    Raises:
        UpdateError: naming the site whose update does not fit the base, or lies too far from it.
        TensorsError: there is no update, a file does not fit its manifest, or a tensor has no finite mean.
    """
    ordered = sorted(updates, key=lambda update: update[1].site)
    _check_updates(ordered, *base)
    sources = {manifest.site: _Source(path, manifest.blob) for path, manifest in ordered}
    old = _Source(*base)
    if strategy.max_norm_ratio is not None:
        _check_distances(_distances(sources, old, base[1]), strategy.max_norm_ratio)
    weighted = [(sources[manifest.site], site_weight(manifest, strategy)) for _, manifest in ordered]
    rate = strategy.server_learning_rate
    values = slice_values if strategy.rule == "mean" else max(1, MATRIX_SLICES * slice_values // len(sources))
    with BlobWriter(output) as writer:
        for index, spec in enumerate(base[1].tensors):
            writer.begin(TensorSpec(spec.name, "float32", spec.shape))
            for start, stop in _slices(spec, values):
                match strategy.rule:
                    case "mean":
                        mean = _mean(weighted, index, start, stop)
                    case "median":
                        mean = median(_rows(weighted, index, start, stop))
                    case "trimmed_mean":
                        mean = trimmed_mean(_rows(weighted, index, start, stop), strategy.trimmed(len(weighted)))
                writer.write(_step(old.read(index, start, stop), mean, rate, spec.name))
    return writer.manifest


def site_weight(manifest: UploadManifest, strategy: StrategyConfig) -> float:
    """Return how much a site's update counts in the mean."""
    return float(manifest.cases) if strategy.weighting == "cases" else 1.0


def convert(path: Path | SealedFile, manifest: BlobManifest, output: Path, dtype: Dtype) -> BlobManifest:
    """Write a blob anew with its floats as `dtype` and return the new manifest; whole numbers stay as they are.

    Raises:
        TensorsError: the file's size is not the manifest's, or `dtype` is no float.
    """
    if dtype == "int64":
        raise TensorsError(f"{path}: floats cannot be converted to int64")
    source = _Source(path, manifest)
    with BlobWriter(output) as writer:
        for index, spec in enumerate(manifest.tensors):
            kind = spec.dtype if spec.dtype == "int64" else dtype
            writer.begin(TensorSpec(spec.name, kind, spec.shape))
            for start, stop in _slices(spec, SLICE_VALUES):
                if kind == "int64":
                    writer.write_raw(source.raw(index, start, stop))
                else:
                    writer.write(source.read(index, start, stop))
    return writer.manifest


class BlobWriter:
    """Writes a blob piece by piece, in bounded memory; `manifest` is there once it is closed.

    Tensors must begin in the order of their names. A blob that is left by an error is deleted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._specs: list[TensorSpec] = []
        self._hashes: list[bytes] = []
        self._hash = hashlib.sha256()
        self._filled = 0

    def begin(self, spec: TensorSpec) -> None:
        """Say what the next bytes are."""
        assert not self._specs or self._specs[-1].name < spec.name, spec.name
        self._specs.append(spec)

    def write(self, values: NDArray[np.float32]) -> None:
        """Append values in the current tensor's dtype."""
        narrow = self._specs[-1].dtype == "bfloat16"
        self.write_raw(bfloat16_bits(values).tobytes() if narrow else values.astype("<f4", copy=False).tobytes())

    def write_raw(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        view = memoryview(data)
        while view:
            piece = view[: CHUNK_BYTES - self._filled]
            self._hash.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == CHUNK_BYTES:
                self._end_chunk()

    @property
    def manifest(self) -> BlobManifest:
        """The manifest of what was written."""
        assert self._file.closed
        return BlobManifest(tuple(self._specs), b"".join(self._hashes))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._path.unlink(missing_ok=True)
        elif self._filled:
            self._end_chunk()

    def _end_chunk(self) -> None:
        self._hashes.append(self._hash.digest())
        self._hash = hashlib.sha256()
        self._filled = 0


class _Source:
    """A blob on disk that is read in pieces; no descriptor stays open, however many sites there are."""

    def __init__(self, path: Path | SealedFile, manifest: BlobManifest) -> None:
        if isinstance(path, Path) and path.stat().st_size != manifest.size:
            size = path.stat().st_size
            raise TensorsError(f"{path}: file has {size} bytes, but its manifest says {manifest.size}")
        self._path = path
        self._tensors = list(manifest.offsets())

    def read(self, index: int, start: int, stop: int) -> NDArray[np.float32]:
        """Return values [start, stop) of a float tensor."""
        return as_float32(self.raw(index, start, stop), self._tensors[index][0].dtype)

    def raw(self, index: int, start: int, stop: int) -> bytes:
        """Return the bytes of values [start, stop) of a tensor."""
        spec, at = self._tensors[index]
        item = ITEM_BYTES[spec.dtype]
        wanted = (stop - start) * item
        if isinstance(self._path, SealedFile):
            return self._path.read(at + start * item, wanted)
        with self._path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), wanted, at + start * item)
        if len(data) != wanted:
            raise TensorsError(f"{self._path}: {spec.name} ends early, but its size was right a moment ago")
        return data


def _check_updates(updates: Sequence[tuple[Path | SealedFile, UploadManifest]], path: Path, base: BlobManifest) -> None:
    if not updates:
        raise TensorsError(f"{path}: no update to merge")
    whole = [spec.name for spec in base.tensors if spec.dtype == "int64"]
    if whole:
        raise TensorsError(f"{path}: {whole[0]} is int64, but only floats have a mean")
    table = [(spec.name, spec.shape) for spec in base.tensors]
    sites = [manifest.site for _, manifest in updates]
    for _, manifest in updates:
        if sites.count(manifest.site) > 1:
            raise UpdateError(manifest.site, "has more than one update, but one counts")
        if [(spec.name, spec.shape) for spec in manifest.blob.tensors] != table:
            raise UpdateError(manifest.site, "names or shapes of its update are not those of the model")
        if any(spec.dtype == "int64" for spec in manifest.blob.tensors):
            raise UpdateError(manifest.site, "its update holds int64, but only floats have a mean")
        if manifest.cases <= 0:
            raise UpdateError(manifest.site, f"its update counts {manifest.cases} cases, but must count some")


def _slices(spec: TensorSpec, values: int) -> Iterator[tuple[int, int]]:
    total = spec.size // ITEM_BYTES[spec.dtype]
    return ((start, min(start + values, total)) for start in range(0, total, values))


def _mean(sources: Sequence[tuple[_Source, float]], index: int, start: int, stop: int) -> NDArray[np.float64]:
    total = np.zeros(stop - start)
    term = np.empty_like(total)
    for source, weight in sources:
        np.multiply(source.read(index, start, stop), weight, out=term)
        total += term
    total /= sum(weight for _, weight in sources)
    return total


def _rows(sources: Sequence[tuple[_Source, float]], index: int, start: int, stop: int) -> NDArray[np.float32]:
    rows = np.empty((len(sources), stop - start), np.float32)
    for row, (source, _) in zip(rows, sources, strict=True):
        row[:] = source.read(index, start, stop)
    return rows


def _distances(sources: Mapping[str, _Source], old: _Source, base: BlobManifest) -> dict[str, float]:
    """Return each site's L2 distance from the base over all that is shared, in one pass over every file."""
    squares = dict.fromkeys(sources, 0.0)
    for index, spec in enumerate(base.tensors):
        for start, stop in _slices(spec, SLICE_VALUES):
            before = old.read(index, start, stop).astype(np.float64)
            for site, source in sources.items():
                change = source.read(index, start, stop) - before
                squares[site] += float(np.square(change, out=change).sum())
    return {site: math.sqrt(square) for site, square in squares.items()}


def _check_distances(distances: Mapping[str, float], ratio: float) -> None:
    far = outlier(distances, ratio)
    if far is not None:
        site, middle = far
        raise UpdateError(
            site,
            f"its update lies {distances[site]:.4g} from the model, but at most {ratio * middle:.4g} counts: "
            f"strategy.max_norm_ratio = {ratio:g} times {middle:.4g}, the median of {len(distances)} sites",
        )


def _step(base: NDArray[np.float32], mean: NDArray[np.float64], rate: float, name: str) -> NDArray[np.float32]:
    mean *= rate
    if rate != 1.0:
        mean += (1.0 - rate) * base.astype(np.float64)
    with np.errstate(over="ignore"):
        new = mean.astype(np.float32)
    if not np.isfinite(new).all():
        raise TensorsError(f"{name}: the updates' mean is not finite")
    return new
