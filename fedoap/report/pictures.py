"""A case as a picture: its image, the reference's outline and the prediction's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 288
"""Pixels of a picture's longer side, at most, unless the image has more."""
REFERENCE = (34, 197, 94)
PREDICTION = (249, 115, 22)


def spread(scores: Sequence[float], count: int) -> list[int]:
    """Return which cases to show, from the worst score to the best, evenly spread.

    >>> spread([0.9, 0.1, 0.5, 0.7, 0.8], 3)
    [1, 3, 0]
    """
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [order[place] for place in places]


def write_picture(path: Path, image: NDArray[np.floating], masks: Sequence[NDArray[np.bool_]]) -> None:
    """Write a PNG of an image with values in any range, reference and prediction outlined.

    Shapes: image (C, *S), masks (*S), S two or three spatial dimensions. Of a volume the slice with most of
    the reference is shown.
    """
    plane, outlines = _plane(image[0], masks)
    scale = max(1, SIDE // max(plane.shape))
    grey = Image.fromarray(_grey(plane)).resize(
        (plane.shape[1] * scale, plane.shape[0] * scale), Image.Resampling.BICUBIC
    )
    pixels = np.array(grey.convert("RGB"))
    for mask, colour in zip(outlines, (REFERENCE, PREDICTION), strict=False):
        pixels[_outline(np.kron(mask, np.ones((scale, scale), bool)))] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _plane(
    image: NDArray[np.floating], masks: Sequence[NDArray[np.bool_]]
) -> tuple[NDArray[np.floating], list[NDArray[np.bool_]]]:
    if image.ndim == 2:
        return image, list(masks)
    best = int(masks[0].sum(axis=(0, 1)).argmax())
    return image[..., best], [mask[..., best] for mask in masks]


def _grey(plane: NDArray[np.floating]) -> NDArray[np.uint8]:
    low, high = np.percentile(plane, (0.5, 99.5))
    scaled = (plane - low) / max(float(high - low), 1e-6)
    return np.asarray(scaled.clip(0, 1) * 255, np.uint8)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 2)
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (-2, -1, 1, 2):
            inner &= np.roll(padded, shift, axis)[2:-2, 2:-2]
    return mask & ~inner
