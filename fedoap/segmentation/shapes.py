"""What phantoms are drawn with: a space, smooth noise, ellipsoids, tubes, lesions.

Lengths are in halves of the image, so the same drawing fits every size, and 2-D and 3-D alike:
positions are (down, across) from -1 to 1, and in 3-D also (along). S stands for the spatial axes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]
Random = np.random.Generator
Mask = NDArray[np.bool_]

STEP = 0.02
"""Length of a path's step: below a voxel in images of up to 100 voxels, and below a tube's radius in any."""


@dataclass(frozen=True)
class Space:
    """The voxels of one image and where they lie."""

    shape: tuple[int, ...]

    @cached_property
    def positions(self) -> Floats:
        """Each voxel's centre: (d, *S)."""
        axes = [(np.arange(n) + 0.5) * 2 / n - 1 for n in self.shape]
        return np.stack(np.meshgrid(*axes, indexing="ij"))

    @property
    def voxels(self) -> float:
        """Voxels of half the image: what a length is multiplied by to count voxels."""
        return min(self.shape) / 2

    def noise(self, random: Random, length: float, *, stretch: tuple[float, float] = (1.0, 1.0)) -> Floats:
        """Return smooth noise of mean 0 and standard deviation 1 that varies over a length."""
        widths = [length * self.voxels * factor for factor in (*stretch, 1.0)[: len(self.shape)]]
        field = ndimage.gaussian_filter(random.standard_normal(self.shape), widths, mode="wrap")
        return np.asarray((field - field.mean()) / max(float(field.std()), 1e-12))

    def ellipsoid(
        self,
        centre: tuple[float, float],
        radii: tuple[float, float],
        *,
        turn: float = 0.0,
        along: tuple[float, float] = (0.0, 1.1),
    ) -> Floats:
        """Return the distance from a centre in radii: 1 on the surface; `along` is centre and radius in 3-D."""
        down, across = self.positions[0] - centre[0], self.positions[1] - centre[1]
        turned = (down * np.cos(turn) - across * np.sin(turn), down * np.sin(turn) + across * np.cos(turn))
        square = (turned[0] / radii[0]) ** 2 + (turned[1] / radii[1]) ** 2
        if len(self.shape) == 3:
            square = square + ((self.positions[2] - along[0]) / along[1]) ** 2
        return np.asarray(np.sqrt(square))

    def tubes(self, random: Random, starts: Floats, steps: int, radius: float) -> Floats:
        """Return the distance, in radii that shrink along the way, from crooked paths that start at (n, d) points."""
        level = np.full(self.shape, np.inf)
        for start in starts:
            heading = random.standard_normal(len(self.shape))
            points = [np.asarray(start)]
            for _ in range(steps):
                heading = heading / np.linalg.norm(heading) + 0.2 * random.standard_normal(len(self.shape))
                points.append(points[-1] + STEP * heading / np.linalg.norm(heading))
            level = np.minimum(level, self._path(np.stack(points), radius))
        return level

    def _path(self, points: Floats, radius: float) -> Floats:
        places = np.round((points + 1) / 2 * np.asarray(self.shape) - 0.5).astype(int)
        inside = ((places >= 0) & (places < np.asarray(self.shape))).all(axis=1)
        if not inside.any():
            return np.full(self.shape, np.inf)
        free = np.ones(self.shape, dtype=bool)
        free[tuple(places[inside].T)] = False
        distance, nearest = ndimage.distance_transform_edt(free, return_indices=True)
        progress = np.zeros(self.shape)
        progress[tuple(places[inside].T)] = np.linspace(0, 1, int(inside.sum()))
        width = radius * (1 - 0.7 * progress[tuple(nearest)])
        return np.asarray(distance / self.voxels / width)


def cover(level: Floats, edge: float = 0.05) -> Floats:
    """Return how much of each voxel lies inside: 1 well below level 1, 0 well above, soft between."""
    return np.asarray(1 / (1 + np.exp(np.clip((level - 1) / edge, -30, 30))))


def paint(image: Floats, level: Floats, value: Floats | float, edge: float = 0.05) -> Floats:
    """Return the image with a value inside a shape."""
    inside = cover(level, edge)
    return np.asarray(image * (1 - inside) + value * inside)


def beyond(level: Floats, gap: float) -> Floats:
    """Return the level of what lies outside a shape: below 1 where the shape's is above `gap`."""
    return np.asarray(gap / np.maximum(level, 1e-3))


@dataclass(frozen=True, slots=True)
class Look:
    """How a lesion's grey differs from the surrounding tissue: its core, and the rim around that."""

    core: float
    rim: float
    radius: tuple[float, float]
    """Smallest and largest."""


@dataclass(frozen=True, slots=True)
class Lesion:
    """One lesion: where it is, and by how much its grey differs from the tissue's."""

    level: Floats
    difference: Floats


def lesion(space: Space, random: Random, tissue: Floats, look: Look) -> Lesion:
    """Return a lobed blob with a core and a rim, inside the tissue, which reaches to its own level 1."""
    size = random.uniform(*look.radius)
    places = np.argwhere(tissue < 0.95)
    chosen = places[random.integers(len(places))]
    centre = [float(axis[tuple(chosen)]) for axis in space.positions]
    stretch = random.uniform(0.75, 1.0)
    level = space.ellipsoid(
        (centre[0], centre[1]),
        (size * stretch, size / stretch**0.5),
        turn=random.uniform(0, np.pi),
        along=(centre[-1], size),
    )
    # lobes: the surface moves in and out, but the centre stays inside
    level = np.maximum(level * (1 + 0.16 * space.noise(random, size * 0.55)), tissue)
    rim = np.exp(-(((level - 0.88) / 0.18) ** 2))
    speckled = 0.25 * abs(look.rim - look.core) * space.noise(random, 0.04)
    contrast = random.uniform(0.7, 1.2)
    return Lesion(level, contrast * (look.core + (look.rim - look.core) * rim + speckled))


def spots(space: Space, random: Random, region: Mask, number: int, radius: tuple[float, float]) -> Floats:
    """Return the level of smooth round spots in a region: as bright as lesions, but without rim or lobes."""
    level = np.full(space.shape, np.inf)
    places = np.argwhere(region)
    for _ in range(number):
        chosen = places[random.integers(len(places))]
        centre = [float(axis[tuple(chosen)]) for axis in space.positions]
        size = random.uniform(*radius)
        one = space.ellipsoid((centre[0], centre[1]), (size, size), along=(centre[-1], size))
        level = np.minimum(level, one)
    return level
