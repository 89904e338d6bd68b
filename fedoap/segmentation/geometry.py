"""Where a voxel of the network's grid lies in the file: orientation, resampling, padding, and back.

An image's array goes through three grids: the file's; the same in standard order (rows first in 2-D,
right-anterior-superior in 3-D); and the network's, which holds a box of it, resampled and centred between
padding. There is a way back through each, so a mask predicted on the last returns to the first.
S stands for the spatial axes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""First voxel, and the one after the last, along each axis."""
MARGIN = 0.05
"""A margin's values lie within this share of the image's range from its darkest value."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A file's voxel grid; the standard order is `axes` of the file's array, then `flips`."""

    shape: tuple[int, ...]
    """Of the file's array, without channels and axes of length 1 that the network does not have."""
    file_shape: tuple[int, ...]
    """Likewise, with those axes."""
    axes: tuple[int, ...]
    flips: tuple[bool, ...]
    affine: tuple[float, ...] | None = None
    """The file's 4 x 4 matrix from voxels to millimetres, row by row, where it has one."""
    spacing_mm: tuple[float, ...] | None = None
    """Of a voxel in standard order, where the file says so."""

    @property
    def standard_shape(self) -> tuple[int, ...]:
        """The shape in standard order."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def file_spacing_mm(self) -> tuple[float, ...] | None:
        """A voxel's size along the axes of `shape`."""
        if self.spacing_mm is None:
            return None
        return tuple(self.spacing_mm[self.axes.index(axis)] for axis in range(len(self.axes)))

    def to_standard(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return an array (C, *S) of the file in standard order."""
        moved = array.transpose(0, *(axis + 1 for axis in self.axes))
        return np.flip(moved, tuple(axis + 1 for axis, flip in enumerate(self.flips) if flip))

    def to_file(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return an array (*S) in standard order as the file has it."""
        flipped = np.flip(array, tuple(axis for axis, flip in enumerate(self.flips) if flip))
        return np.ascontiguousarray(flipped.transpose(np.argsort(self.axes)).reshape(self.file_shape))


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a file's grid was fitted into the network's."""

    grid: Grid
    size: tuple[int, ...]
    """Of the network's grid."""
    start: tuple[int, ...]
    stop: tuple[int, ...]
    """The box of the image, in standard order, that the network sees."""
    content: tuple[int, ...]
    """Voxels of the network's grid that show the image; the others are padding."""

    @classmethod
    def fitted(cls, grid: Grid, size: tuple[int, ...], spacing_mm: tuple[float, ...] | None, box: Box) -> Self:
        """Return the geometry that shows the whole box, its aspect ratio kept.

        With `spacing_mm`, and a file that gives its own, voxels get that spacing, or a coarser one if the
        image would not fit otherwise; without, the image is made as large as fits.
        """
        own = grid.spacing_mm or (1.0,) * len(size)
        wanted = spacing_mm if spacing_mm and grid.spacing_mm else (1.0,) * len(size)
        extent = [n * have / want for n, have, want in zip(_lengths(box), own, wanted, strict=True)]
        scale = min(n / length for n, length in zip(size, extent, strict=True))
        if spacing_mm and grid.spacing_mm:
            scale = min(1.0, scale)
        content = (min(n, max(1, round(length * scale))) for n, length in zip(size, extent, strict=True))
        return cls(grid, size, *box, tuple(content))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The box's, in voxels of the file."""
        return _lengths((self.start, self.stop))

    @property
    def box(self) -> tuple[slice, ...]:
        """The box as an index."""
        return tuple(slice(*ends) for ends in zip(self.start, self.stop, strict=True))

    @property
    def inside(self) -> tuple[slice, ...]:
        """The content's place in the network's grid."""
        starts = ((n - m) // 2 for n, m in zip(self.size, self.content, strict=True))
        return tuple(slice(start, start + m) for start, m in zip(starts, self.content, strict=True))

    @property
    def network_spacing_mm(self) -> tuple[float, ...] | None:
        """A voxel's size in the network's grid, where the file's is known."""
        if self.grid.spacing_mm is None:
            return None
        rows = zip(self.grid.spacing_mm, self.lengths, self.content, strict=True)
        return tuple(have * n / m for have, n, m in rows)

    def cut(self, values: Floats) -> Floats:
        """Return the box of values (C, *S) in standard order."""
        return values[(slice(None), *self.box)]

    def pad(self, content: Floats, fill: float) -> Floats:
        """Return the network's grid (C, *S) with resampled content in its middle."""
        padded = np.full((content.shape[0], *self.size), fill, dtype=np.float32)
        padded[(slice(None), *self.inside)] = content
        return padded

    def restore(self, values: Floats) -> Floats:
        """Return values (*S) of the network's grid, such as probabilities, on the file's; 0 outside the box."""
        standard = np.zeros(self.grid.standard_shape, dtype=np.float32)
        standard[self.box] = resample(values[self.inside][None], self.lengths)[0]
        return self.grid.to_file(standard).astype(np.float32)


def whole(values: Floats) -> Box:
    """Return the box of all of an image (C, *S)."""
    return (0,) * (values.ndim - 1), values.shape[1:]


def shown(values: Floats) -> Box:
    """Return the smallest box outside of which an image (C, *S) is dark in every channel."""
    low, high = values.min(), np.percentile(values, 99.5)
    bright = (values > low + MARGIN * (high - low)).any(axis=0)
    if not bright.any():
        return whole(values)
    start, stop = [], []
    for axis in range(bright.ndim):
        along = np.flatnonzero(bright.any(axis=tuple(other for other in range(bright.ndim) if other != axis)))
        start.append(int(along[0]))
        stop.append(int(along[-1]) + 1)
    return tuple(start), tuple(stop)


def resample(values: Floats, shape: tuple[int, ...]) -> Floats:
    """Return an array (C, *S) linearly resampled to a shape, smoothed along axes that shrink."""
    for axis, n in enumerate(shape, start=1):
        if values.shape[axis] != n:
            weights = _weights(values.shape[axis], n)
            values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(values, dtype=np.float32)


def resample_mask(mask: Floats, shape: tuple[int, ...]) -> Floats:
    """Return a mask (1, *S) resampled to a shape; one that marks anything, however small, keeps at least a voxel."""
    share = resample(mask, shape)
    return (share >= min(0.5, max(float(share.max()), 1e-6))).astype(np.float32)


def _lengths(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in zip(*box, strict=True))


@lru_cache(maxsize=64)
def _weights(source: int, target: int) -> Floats:
    # the triangle filter of linear interpolation, as wide as a target voxel where that is the wider one
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(source)[None] - centres[:, None]) / max(1.0, scale)
    weights = np.maximum(0.0, 1.0 - distance)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)
