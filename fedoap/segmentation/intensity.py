"""Grey values of a scanner -> numbers of about unit spread, by modality.

Magnetic resonance, ultrasound and photographs have no unit: they are standardised by the mean and the
standard deviation of the voxels that are not zero, since zero is a scanner's or an exporter's background.
Outliers are clipped first; at the dark end only for those two numbers, so that the background stays apart.
Computed tomography is in Hounsfield units and keeps an absolute window; an 8-bit export of it has lost
them, and is stretched from zero to a percentile instead.
"""

from dataclasses import dataclass

import numpy as np

from fedoap.config import Modality, SiteData
from fedoap.segmentation.geometry import Floats

SOFT_TISSUE_HU = (-100.0, 300.0)
EXPORT_RANGE = (0.0, 255.0)
"""Computed tomography whose values all lie in this range is taken for an 8-bit export."""
EXPORT_TOP = (99.5,)
"""Percentile of the voxels that are not zero at which an 8-bit export is cut."""
FEWEST = 16
"""An image with fewer voxels that are not zero is measured over all of them."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Where grey values are clipped, in percent of the voxels that are not zero."""

    low: float
    high: float


CUTS: dict[Modality, Percentiles] = {
    "mr": Percentiles(1.0, 99.0),
    "ultrasound": Percentiles(0.5, 99.5),
    "photo": Percentiles(0.5, 99.5),
}


def scaled(values: Floats, data: SiteData) -> Floats:
    """Return an image (C, *S) with intensities for the network, channel by channel."""
    return np.stack([_channel(channel, data) for channel in values]).astype(np.float32)


def _channel(values: Floats, data: SiteData) -> Floats:
    if data.window is not None:
        return _windowed(values, *data.window)
    if data.modality != "ct":
        return _standardised(values, CUTS[data.modality])
    if EXPORT_RANGE[0] <= values.min() and values.max() <= EXPORT_RANGE[1]:
        (high,) = np.percentile(_foreground(values), EXPORT_TOP)
        return _windowed(values, 0.0, float(high))
    return _windowed(values, *SOFT_TISSUE_HU)


def _windowed(values: Floats, low: float, high: float) -> Floats:
    # [0, 1] of the window becomes [-2, 2], about the spread of the standardised modalities
    share = np.clip((values - low) / max(high - low, 1e-6), 0.0, 1.0)
    return np.asarray(4.0 * share - 2.0, dtype=np.float32)


def _standardised(values: Floats, cut: Percentiles) -> Floats:
    foreground = _foreground(values)
    low, high = np.percentile(foreground, (cut.low, cut.high))
    inside = np.clip(foreground, low, high)
    clipped = np.clip(values, min(float(low), 0.0), high)
    spread = inside.std() if inside.min() < inside.max() else values.std()  # a flat foreground has none of its own
    return np.asarray((clipped - inside.mean()) / max(float(spread), 1e-6), dtype=np.float32)


def _foreground(values: Floats) -> Floats:
    foreground = values[values != 0]
    return foreground if foreground.size >= FEWEST else values.ravel()
