"""Random changes of a training batch: one resampling for all of its geometry, then its grey values.

A batch is changed as a whole in torch, on the device where it lies. Each item draws from its own stream of
(seed, step, item), so a batch that is split over processes changes as it would in one. MONAI's random
transforms draw from one sequential generator and work image by image, which is why they are not used here.
B stands for the batch, C for channels, S for the spatial axes, d for their number.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedoap.config import Modality
from fedoap.segmentation.streams import stream

CONTROL_POINTS = 5
"""Of the elastic deformation, along each axis."""
BLUR_RADIUS = 2


@dataclass(frozen=True, slots=True)
class Strength:
    """The largest change of each kind; the draws are symmetric about no change."""

    flips: tuple[tuple[int, ...], tuple[int, ...]]
    """Axes to mirror, in 2-D (rows, columns) and 3-D (right, anterior, superior)."""
    rotation_degrees: float
    scale: float
    """Largest factor; the smallest is its inverse."""
    shift: float
    """In parts of the image's length."""
    elastic: float
    """Standard deviation of a control point's shift, in parts of the image's length, for a third of the items."""
    gamma: float
    """Largest exponent; the smallest is its inverse."""
    contrast: float
    """Largest factor; the smallest is its inverse."""
    brightness: float
    noise: float
    """Largest standard deviation of what is added."""
    speckle: float
    """Largest standard deviation of the factor about 1."""
    blur: float
    """Largest standard deviation in voxels, for a third of the items."""


STRENGTHS: dict[Modality, Strength] = {
    "mr": Strength(((0, 1), (0,)), 20, 1.25, 0.06, 0.015, 1.4, 1.25, 0.3, 0.15, 0.0, 1.0),
    "ct": Strength(((0, 1), (0,)), 20, 1.25, 0.06, 0.015, 1.2, 1.15, 0.2, 0.15, 0.0, 0.8),
    "ultrasound": Strength(((1,), (0,)), 12, 1.25, 0.06, 0.02, 1.4, 1.25, 0.3, 0.05, 0.2, 1.0),
    "photo": Strength(((0, 1), (0, 1, 2)), 45, 1.3, 0.08, 0.015, 1.4, 1.25, 0.4, 0.08, 0.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Draw:
    """The changes of one item of the batch."""

    matrix: NDArray[np.float64]
    """d x (d + 1), from the output's normalised coordinates to the input's, last axis first"""
    bend: NDArray[np.float32]
    """(d, *control points), in normalised coordinates"""
    gamma: float
    contrast: float
    brightness: float
    noise: float
    speckle: float
    blur: float
    field: NDArray[np.float32]
    """Normal numbers (C, *S)."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the patches to return lie in larger images."""

    size: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    """First voxel of each item's patch."""


def augmented(
    images: Tensor,
    labels: Tensor,
    modality: Modality,
    *,
    seed: int,
    step: int,
    items: Sequence[int],
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """Return images (B, C, *S) and masks (B, 1, *S) with random changes that depend on (seed, step, item) alone.

    With `places` patches are returned: each is turned about its own middle, and its corners are filled from the
    image around it.
    """
    strength = STRENGTHS[modality]
    shape = (images.shape[1], *(images.shape[2:] if places is None else places.size))
    draws = [_draw(stream(seed, "augmentation", step, item), strength, shape) for item in items]
    images, labels = _moved(images, labels, draws, places)
    images = _graded(images, draws)
    return _blurred(images, draws), labels


def _draw(random: np.random.Generator, strength: Strength, shape: tuple[int, ...]) -> Draw:
    d = len(shape) - 1
    bent = random.random() < 1 / 3
    bend = random.standard_normal((d, *(CONTROL_POINTS,) * d), dtype=np.float32)
    blurred = random.random() < 1 / 3
    return Draw(
        matrix=_matrix(random, strength, shape[1:]),
        bend=bend * np.float32(2 * strength.elastic if bent else 0.0),
        gamma=_factor(random, strength.gamma),
        contrast=_factor(random, strength.contrast),
        brightness=random.uniform(-strength.brightness, strength.brightness),
        noise=random.uniform(0, strength.noise),
        speckle=random.uniform(0, strength.speckle),
        blur=random.uniform(0.3, strength.blur) if blurred else 0.0,
        field=random.standard_normal(shape, dtype=np.float32),
    )


def _matrix(random: np.random.Generator, strength: Strength, size: tuple[int, ...]) -> NDArray[np.float64]:
    d = len(size)
    linear = np.eye(d)
    for plane in itertools.combinations(range(d), 2):
        # in 3-D slices are thick and patients lie straight: smaller turns out of the first plane
        limit = np.deg2rad(strength.rotation_degrees) / (1 if plane == (0, 1) else 3)
        angle = random.uniform(-limit, limit)
        turn = np.eye(d)
        turn[np.ix_(plane, plane)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        linear = turn @ linear
    linear /= _factor(random, strength.scale)
    for axis in strength.flips[d - 2]:
        linear[:, axis] *= random.choice((-1.0, 1.0))
    shift = random.uniform(-2 * strength.shift, 2 * strength.shift, size=(d, 1))
    lengths = np.asarray(size, dtype=np.float64)
    normalised = linear * lengths[None, :] / lengths[:, None]
    return np.hstack([normalised[::-1, ::-1], shift])


def _factor(random: np.random.Generator, largest: float) -> float:
    return float(largest ** random.uniform(-1, 1))


def _moved(images: Tensor, labels: Tensor, draws: Sequence[Draw], places: Places | None) -> tuple[Tensor, Tensor]:
    size = images.shape[2:] if places is None else places.size
    matrices = torch.from_numpy(np.stack([draw.matrix for draw in draws])).to(images)
    grid = F.affine_grid(matrices, [*images.shape[:2], *size], align_corners=False)  # (B, *S, d)
    bends = np.stack([draw.bend for draw in draws])
    if bends.any():
        mode = "bilinear" if images.dim() == 4 else "trilinear"
        bend = F.interpolate(torch.from_numpy(bends).to(images), size, mode=mode, align_corners=True)
        grid = grid + bend.movedim(1, -1)
    if places is not None:
        grid = _in_the_image(grid, places, images)
    # grid_sample fills with zeros what comes from outside: the image's darkest value once that is subtracted
    floor = images.amin(dim=tuple(range(2, images.dim())), keepdim=True)
    both = F.grid_sample(torch.cat([images - floor, labels], dim=1), grid, align_corners=False)
    return both[:, :-1] + floor, (both[:, -1:] >= 0.5).to(labels.dtype)


def _in_the_image(grid: Tensor, places: Places, images: Tensor) -> Tensor:
    """Return normalised coordinates (B, *S, d) of the patches as those of the images around them."""
    lengths = torch.tensor(images.shape[2:]).to(images)
    patch, starts = torch.tensor(places.size).to(images), torch.tensor(places.starts).to(images)
    middle = (2 * starts + patch) / lengths - 1  # (B, d)
    # grid_sample names the last axis first
    middle = middle.flip(-1).view(len(grid), *[1] * len(places.size), len(places.size))
    return grid * (patch / lengths).flip(-1) + middle


def _graded(images: Tensor, draws: Sequence[Draw]) -> Tensor:
    space = tuple(range(1, images.dim()))
    low, high = images.amin(space, keepdim=True), images.amax(space, keepdim=True)
    span = (high - low).clamp_min(1e-6)
    images = low + span * ((images - low) / span).clamp(0, 1) ** _each(images, [draw.gamma for draw in draws])
    mean = images.mean(space, keepdim=True)
    images = mean + (images - mean) * _each(images, [draw.contrast for draw in draws])
    field = torch.from_numpy(np.stack([draw.field for draw in draws])).to(images)
    amplitude = _each(images, [draw.noise for draw in draws])
    speckle = _each(images, [draw.speckle for draw in draws])
    if any(draw.speckle for draw in draws):
        amplitude = amplitude + speckle * (images - low)
    return images + field * amplitude + _each(images, [draw.brightness for draw in draws])


def _blurred(images: Tensor, draws: Sequence[Draw]) -> Tensor:
    chosen = [index for index, draw in enumerate(draws) if draw.blur > 0]
    if not chosen:
        return images
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1).to(images)
    widths = torch.tensor([draws[index].blur for index in chosen]).to(images)
    kernels = torch.exp(-(taps**2) / (2 * widths[:, None] ** 2))
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(images.shape[1], dim=0)
    part = images[chosen].flatten(0, 1)[None]  # (1, B * C, *S)
    d = images.dim() - 2
    convolve = F.conv2d if d == 2 else F.conv3d
    for axis in range(d):
        padding = [0] * (2 * d)
        padding[2 * (d - 1 - axis) : 2 * (d - axis)] = [BLUR_RADIUS] * 2
        shape = [-1, 1, *(len(taps) if other == axis else 1 for other in range(d))]
        part = convolve(F.pad(part, padding, mode="replicate"), kernels.view(shape), groups=len(kernels))
    images = images.clone()
    images[chosen] = part[0].view(len(chosen), *images.shape[1:])
    return images


def _each(images: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values).to(images).view(-1, *[1] * (images.dim() - 1))
