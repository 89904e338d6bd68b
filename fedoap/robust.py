"""Aggregation rules that a few bad updates cannot steer, and which update lies too far off to count.

Both rules sort the n values that the sites give for one coordinate (Yin et al. 2018, *Byzantine-Robust
Distributed Learning*, definitions 1 and 2, arXiv:1803.01498). They look at values only, so every site
counts alike, whatever its number of cases, and no order of arrival can show in the result. Arrays are
(n, V): n sites, V values, float32 and finite; sums are float64.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

NETWORK_SITES = 16
"""Up to so many rows a network of whole-row minima and maxima sorts faster than one sort a column does."""


def median(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the median of each column: the middle value, or the mean of the two in the middle.

    The values are used up: they are sorted in place.

    >>> median(np.array([[1.0], [900.0], [2.0]], np.float32)).tolist()
    [2.0]
    """
    return trimmed_mean(values, (len(values) - 1) // 2)


def trimmed_mean(values: NDArray[np.float32], cut: int) -> NDArray[np.float64]:
    """Return the mean of each column without its `cut` smallest and `cut` largest values.

    The values are used up: they are sorted in place. What is left is added from the smallest to the largest.

    >>> trimmed_mean(np.array([[1.0], [-900.0], [2.0], [6.0]], np.float32), 1).tolist()
    [1.5]
    """
    assert 0 <= 2 * cut < len(values)
    _sort_columns(values)
    kept = values[cut : len(values) - cut]
    total: NDArray[np.float64] = kept[0].astype(np.float64)
    for row in kept[1:]:
        total += row
    total /= len(kept)
    return total


def outlier(distances: Mapping[str, float], ratio: float) -> tuple[str, float] | None:
    """Return the site that lies farthest off and the median distance, if it lies beyond ratio x that median.

    Ask again without this site until there is none: the sites that are left then bear each other out, and
    whoever knows only them comes to the same end. Of equals the first by name is meant; of fewer than
    three sites none is.

    >>> outlier({"a": 1.0, "b": 1.2, "c": 90.0}, 3.0)
    ('c', 1.2)
    """
    if len(distances) < 3:
        return None
    middle = float(np.median(list(distances.values())))
    far = max(sorted(distances), key=lambda site: distances[site])
    return (far, middle) if distances[far] > ratio * middle else None


def _sort_columns(values: NDArray[np.float32]) -> None:
    values += 0.0  # makes -0 a 0: as equals they would keep an order that is the algorithm's own
    sites = len(values)
    if sites > NETWORK_SITES:
        values.sort(axis=0)
        return
    lower = np.empty_like(values[0])
    for turn in range(sites):  # odd-even transposition: n turns sort n rows
        for row in range(turn % 2, sites - 1, 2):
            np.minimum(values[row], values[row + 1], out=lower)
            np.maximum(values[row], values[row + 1], out=values[row + 1])
            values[row] = lower
