"""Parts of a case that the network sees one at a time, where `data.patch` is smaller than `data.size`.

Training draws patches, a share of them centred on lesions, as nnU-Net does (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z) and MONAI's RandCropByPosNegLabel. The bank reads windows that cover a
case, and prediction blends windows that overlap. B stands for the batch, C for channels, S for the
spatial axes.
"""

# MONAI takes seconds to import, and drawing a patch does not need it
# ruff: noqa: PLC0415

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedoap.dataconfig import DataConfig

SURROUND = 0.25
"""Share of a patch's length that augmentation may see of the case beyond the patch, on each side."""

Voxel: TypeAlias = tuple[int, ...]
Window: TypeAlias = tuple[slice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """A patch with what surrounds it in its case, so that turning it brings in tissue instead of a void."""

    image: Tensor  # (C, *surrounding)
    label: Tensor  # (1, *surrounding)
    start: Voxel
    """First voxel of the patch, in the surrounding."""


def draw_patch(image: Tensor, label: Tensor, data: DataConfig, random: np.random.Generator) -> Patch:
    """Return a patch of a case's image (C, *S) and mask (1, *S), by the generator alone.

    Its centre is a voxel of the lesion with probability `data.lesion_share`; otherwise, or if there is no
    lesion, it is any voxel of the case. A patch that would leave the case is shifted back. Which patches show
    a lesion is drawn and not counted: every n-th could always fall on a step of the shared path.
    """
    size = tuple(image.shape[1:])
    start = _fitted(_centre(label, data.lesion_share, random), data.seen, size)
    margins = tuple(math.ceil(SURROUND * n) if data.augment else 0 for n in data.seen)
    around = tuple(min(whole, n + 2 * more) for whole, n, more in zip(size, data.seen, margins, strict=True))
    first = tuple(
        min(max(at - more, 0), whole - n) for at, more, whole, n in zip(start, margins, size, around, strict=True)
    )
    window = (slice(None), *_window(first, around))
    return Patch(image[window], label[window], tuple(at - corner for at, corner in zip(start, first, strict=True)))


def covering(data: DataConfig) -> list[Window]:
    """Return windows that together cover a case, always the same ones.

    They overlap only along axes where the patch's length does not divide the case's.
    """
    if data.patch is None:
        return [_window((0,) * len(data.size), data.size)]
    from monai.data.utils import dense_patch_slices

    return [tuple(window) for window in dense_patch_slices(data.size, data.patch, data.patch)]


def predict_by_windows(
    predict: Callable[[Tensor], Tensor], images: Tensor, data: DataConfig, at_once: int, device: torch.device
) -> Tensor:
    """Return the logits (B, 1, *S) of images (B, C, *S), blended by Gaussian weights from those of windows.

    Args:
        predict: Windows (B, C, *patch) on the device -> logits (B, 1, *patch).
        images: The logits are returned on their device.
        data: Gives the windows' size and overlap.
        at_once: Windows per batch.
        device: That of the network.
    """
    from monai.inferers.utils import sliding_window_inference

    logits: Tensor = sliding_window_inference(
        images, data.seen, at_once, predict, overlap=data.overlap, mode="gaussian", sw_device=device,
        device=images.device,
    )  # fmt: skip
    return logits


def _centre(label: Tensor, lesion_share: float, random: np.random.Generator) -> Voxel:
    values = label[0].numpy()
    if random.random() < lesion_share:
        marked = np.flatnonzero(values)
        if len(marked):
            return tuple(int(at) for at in np.unravel_index(random.choice(marked), values.shape))
    return tuple(int(at) for at in random.integers(values.shape))


def _fitted(centre: Voxel, lengths: Voxel, size: Voxel) -> Voxel:
    """Return where a window around a centre starts, shifted as little as keeps it within the size."""
    return tuple(min(max(at - n // 2, 0), whole - n) for at, n, whole in zip(centre, lengths, size, strict=True))


def _window(start: Voxel, lengths: Voxel) -> Window:
    return tuple(slice(at, at + n) for at, n in zip(start, lengths, strict=True))
