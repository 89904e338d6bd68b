"""Streaming merge of the sites' weights.

Blobs are read slice by slice with `pread` and never as a whole, one site after the other, so memory
depends neither on the model's size nor on the number of sites: a rule that must see all sites' values
at once gets slices that are the shorter the more sites there are. Sums are float64 and run over the
sites in the order of their names, or over sorted values: every element sees the same operations
whatever the slices are, so the bits of the result depend only on the set of updates. Whole numbers
have no mean: a model with an int64 tensor is refused.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedoap.blobfile import SLICE_VALUES, BlobReader, BlobWriter, ByteSource, slices
from fedoap.config import StrategyConfig
from fedoap.errors import TensorsError, UpdateError
from fedoap.manifests import BlobManifest, Dtype, TensorSpec, UploadManifest
from fedoap.robust import median, outlier, trimmed_mean
from fedoap.server import Average, Server, advance, first_moments
from fedoap.strategies import server_of

KEPT_PREFIX = "server."
"""Starts the names of what the coordinator keeps of a model under a server optimizer with moments: for every
weight a tensor with one axis more, at the end, on which the weight itself and its moments stand side by side."""
MATRIX_SLICES = 8
"""So many slices of float32 values hold those of all sites together, for rules that sort them: 8 MiB."""


def merge_models(
    updates: Sequence[tuple[Path | ByteSource, UploadManifest]],
    base: tuple[Path, BlobManifest],
    strategy: StrategyConfig,
    output: Path,
    *,
    slice_values: int = SLICE_VALUES,
) -> BlobManifest:
    """Write what follows from the base and the mean of the updates, as float32, and return its manifest.

    How is the strategy's server optimizer's business (`fedoap.server`). One without moments leaves the
    weights. One with moments leaves them too, under names that start with `KEPT_PREFIX`: `published` takes
    the weights out of that. The base may be either: moments that are not there start afresh. With another
    `strategy.rule` the median or trimmed mean stands in the mean's place (`fedoap.robust`). The mean is
    weighted as `strategy.weighting` says (McMahan et al. 2017, arXiv:1602.05629).

    Raises:
        UpdateError: naming the site whose update does not fit the base, or lies too far from it.
        TensorsError: there is no update, a file does not fit its manifest, or a tensor has no finite mean.
    """
    ordered = sorted(updates, key=lambda update: update[1].site)
    old = _Base(*base, server_of(strategy))
    _check_updates(ordered, base[0], old.weights)
    sources = {manifest.site: BlobReader(path, manifest.blob) for path, manifest in ordered}
    if strategy.max_norm_ratio is not None:
        _check_distances(_distances(sources, old), strategy.max_norm_ratio)
    weighted = [(sources[manifest.site], site_weight(manifest, strategy)) for _, manifest in ordered]
    with BlobWriter(output) as writer:
        for spec in old.weights:
            writer.begin(_kept_spec(spec, old.moments))
        for start, stop in slices(old.values, _slice_values(strategy, len(sources), slice_values)):
            new = _step(old, start, stop, _middle(strategy, weighted, start, stop))
            finite = np.isfinite(new).reshape(stop - start, -1).all(1)
            if not finite.all():
                raise TensorsError(f"{old.name(start + int(np.argmin(finite)))}: the updates' mean is not finite")
            writer.write(new)
    return writer.manifest


def published(path: Path, kept: BlobManifest, output: Path, dtype: Dtype) -> BlobManifest:
    """Write the weights of a blob that `merge_models` wrote, without moments, as `dtype`; return their manifest."""
    source, columns = BlobReader(path, kept), _columns(kept)
    with BlobWriter(output) as writer:
        for spec in map(_weights_of, kept.tensors):
            writer.begin(TensorSpec(spec.name, dtype, spec.shape))
        for start, stop in slices(source.values // columns, SLICE_VALUES // columns):
            writer.write(source.read(start * columns, stop * columns)[::columns])
    return writer.manifest


def site_weight(manifest: UploadManifest, strategy: StrategyConfig) -> float:
    """Return how much a site's update counts in the mean."""
    return float(manifest.cases) if strategy.weighting == "cases" else 1.0


class _Base:
    """The weights that the sites started from, and the moments that stand beside them or start afresh."""

    def __init__(self, path: Path, manifest: BlobManifest, server: Server) -> None:
        self.server = server
        self.weights = tuple(map(_weights_of, manifest.tensors))
        self._source = BlobReader(path, manifest)
        self._columns = _columns(manifest)
        self._first = np.array(first_moments(server), np.float32)[:, None]  # (moments, 1)
        if self._columns not in (1, 1 + self.moments):
            wanted = f"but the strategy's server optimizer has {self.moments}"
            raise TensorsError(f"{path}: {self.weights[0].name} has {self._columns - 1} moments, {wanted}")

    @property
    def moments(self) -> int:
        """How many stand beside each weight once it was merged."""
        return len(self._first)

    @property
    def values(self) -> int:
        """How many weights there are."""
        return self._source.values // self._columns

    def name(self, value: int) -> str:
        """Return the name of the tensor that holds a weight."""
        return self._source.name(value * self._columns).removeprefix(KEPT_PREFIX)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return weights and moments [start, stop), a row each."""
        columns = self._columns
        rows = self._source.read(start * columns, stop * columns).reshape(-1, columns).T
        if columns > 1 or not self.moments:
            return rows
        return np.concatenate([rows, np.broadcast_to(self._first, (self.moments, stop - start))])


def _columns(manifest: BlobManifest) -> int:
    """Return how many values stand side by side for each weight: itself and, in a blob that is kept, its moments."""
    return next((spec.shape[-1] for spec in manifest.tensors if spec.name.startswith(KEPT_PREFIX)), 1)


def _kept_spec(weights: TensorSpec, moments: int) -> TensorSpec:
    if not moments:
        return TensorSpec(weights.name, "float32", weights.shape)
    return TensorSpec(KEPT_PREFIX + weights.name, "float32", (*weights.shape, 1 + moments))


def _weights_of(spec: TensorSpec) -> TensorSpec:
    if not spec.name.startswith(KEPT_PREFIX):
        return spec
    return TensorSpec(spec.name.removeprefix(KEPT_PREFIX), spec.dtype, spec.shape[:-1])


def _check_updates(
    updates: Sequence[tuple[Path | ByteSource, UploadManifest]], path: Path, base: Sequence[TensorSpec]
) -> None:
    if not updates:
        raise TensorsError(f"{path}: no update to merge")
    whole = [spec.name for spec in base if spec.dtype == "int64"]
    if whole:
        raise TensorsError(f"{path}: {whole[0]} is int64, but only floats have a mean")
    table = [(spec.name, spec.shape) for spec in base]
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


def _slice_values(strategy: StrategyConfig, sites: int, values: int) -> int:
    """Return how many values are looked at together, whole slices where there is room for one of each site."""
    if strategy.rule == "mean":
        return values
    together = max(1, MATRIX_SLICES * values // sites)
    return max(together - together % values, min(together, values))


def _middle(
    strategy: StrategyConfig, weighted: Sequence[tuple[BlobReader, float]], start: int, stop: int
) -> NDArray[np.float64]:
    """Return what the updates have in common by the strategy's rule: values [start, stop)."""
    match strategy.rule:
        case "mean":
            return _mean(weighted, start, stop)
        case "median":
            return median(_rows(weighted, start, stop))
        case "trimmed_mean":
            return trimmed_mean(_rows(weighted, start, stop), strategy.trimmed(len(weighted)))


def _mean(sources: Sequence[tuple[BlobReader, float]], start: int, stop: int) -> NDArray[np.float64]:
    total = np.zeros(stop - start)
    term = np.empty_like(total)
    for source, weight in sources:
        np.multiply(source.read(start, stop), weight, out=term)
        total += term
    total /= sum(weight for _, weight in sources)
    return total


def _rows(sources: Sequence[tuple[BlobReader, float]], start: int, stop: int) -> NDArray[np.float32]:
    rows = np.empty((len(sources), stop - start), np.float32)
    for row, (source, _) in zip(rows, sources, strict=True):
        row[:] = source.read(start, stop)
    return rows


def _distances(sources: Mapping[str, BlobReader], old: _Base) -> dict[str, float]:
    """Return each site's L2 distance from the base over all that is shared, in one pass over every file."""
    squares = dict.fromkeys(sources, 0.0)
    for start, stop in slices(old.values, SLICE_VALUES):
        before = old.read(start, stop)[0].astype(np.float64)
        for site, source in sources.items():
            change = source.read(start, stop) - before
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


def _step(old: _Base, start: int, stop: int, mean: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the next weights, or weights and moments side by side, as they are written."""
    with np.errstate(over="ignore", invalid="ignore"):
        if old.server == Average():  # the base does not count, and need not be read
            return mean.astype(np.float32)
        before = old.read(start, stop).astype(np.float64)
        x, moments = advance(old.server, before[0], mean, before[1:])
        return np.concatenate([x[None], moments]).T.astype(np.float32).ravel()
