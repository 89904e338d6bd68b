"""Prepared cases, training batches, and masks back on the file's grid.

Batches are a function of (seed, step): a process that restarts at step k sees the batches that it would
have seen without the restart. The training cases form an endless sequence of epochs, each a new
permutation, which is cut into batches; a batch may hold the end of one epoch and the start of the next, so
that no case is left out. B stands for the batch, C for channels, S for the spatial axes.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoap.config import Plan, SiteData
from fedoap.errors import DataError
from fedoap.segmentation.augmentation import Places, augmented
from fedoap.segmentation.datalist import Case
from fedoap.segmentation.patches import draw_patch
from fedoap.segmentation.prepared import PreparedCase, load_case
from fedoap.segmentation.readers import read_label, write_mask
from fedoap.segmentation.streams import stream

MEMORY_BYTES = 2**30
"""Training cases beyond this are read from the cache folder again each time."""

__all__ = [
    "PreparedCase",
    "Shelf",
    "load_case",
    "prepared_cases",
    "reference",
    "restore",
    "save_mask",
    "shelf_batches",
    "training_batches",
]


def prepared_cases(cases: Sequence[Case], data: SiteData, plan: Plan, cache: Path | None = None) -> list[PreparedCase]:
    """Return the cases prepared, in their order.

    Raises:
        DataError: an image or a mask is wrong, or every mask is empty.
        StorageError: the cache cannot be written.
    """
    prepared = [load_case(case, data, plan, cache) for case in cases]
    _check_some_lesion(prepared, data)
    return prepared


def training_batches(
    cases: Sequence[Case],
    data: SiteData,
    plan: Plan,
    *,
    seed: int,
    start_step: int = 0,
    cache: Path | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the endless batches from `start_step` on: images (B, C, *S) and masks (B, 1, *S), float32.

    If `data.patch` is given it is S, and each item is a patch of its case; otherwise it is the whole case.

    Every case is prepared, and so checked, before this returns.

    Args:
        cases: The training cases.
        data: How they are read.
        plan: Gives size, patch, batch size and whether to augment.
        seed: Fixes order and augmentation.
        start_step: The first batch is that of this step.
        cache: Folder of prepared cases.
        rank: This process among those that share each batch.
        ranks: How many they are; each gets every `ranks`-th item.

    Raises:
        DataError: there is no case, or one is wrong.
        StorageError: the cache cannot be written.
    """
    return shelf_batches(Shelf(cases, data, plan, cache), seed=seed, start_step=start_step, rank=rank, ranks=ranks)


def shelf_batches(
    shelf: "Shelf", *, seed: int, start_step: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches of `training_batches` from cases that are already prepared."""
    return _batches(shelf, seed=seed, step=start_step, items=range(rank, shelf.plan.training.batch_size, ranks))


def order(seed: int, position: int, cases: int) -> int:
    """Return which case stands at a position of the endless sequence of epochs."""
    epoch, place = divmod(position, cases)
    return int(_permutation(seed, epoch, cases)[place])


def restore(mask: Tensor | NDArray[np.generic], prepared: PreparedCase) -> NDArray[np.uint8]:
    """Return a mask, or better its probabilities, on the network's grid as zeros and ones on the file's."""
    values = torch.as_tensor(mask).detach().to("cpu", torch.float32).numpy()
    size = prepared.geometry.size
    if values.shape not in (size, (1, *size)):
        raise ValueError(f"mask has shape {values.shape}, but the network's grid is {size}")
    return (prepared.geometry.restore(values.reshape(size)) >= 0.5).astype(np.uint8)


def save_mask(path: Path, mask: NDArray[np.generic], prepared: PreparedCase) -> None:
    """Write a mask that `restore` returned, with the geometry of the case's image.

    A picture's mask is best written as .png, one of NIfTI or DICOM as .nii.gz.

    Raises:
        DataError: the path's ending does not suit the mask.
        StorageError: the disk refused.
    """
    write_mask(path, mask.astype(np.uint8), prepared.geometry.grid)


def reference(prepared: PreparedCase) -> NDArray[np.uint8]:
    """Return the case's mask on the file's grid, read anew.

    Raises:
        DataError: the case has no mask, or the file is wrong.
    """
    if prepared.case.label is None:
        raise DataError(f"case {prepared.case.name}: label is missing, but only prediction goes without")
    grid = prepared.geometry.grid
    label = read_label(prepared.case, grid, len(grid.axes))
    return grid.to_file(label.values[0]).astype(np.uint8)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, cases: int) -> NDArray[np.int64]:
    return stream(seed, "order", epoch).permutation(cases)


class Shelf:
    """The training cases, each checked: in memory as far as the budget goes, the others behind the cache.

    Raises:
        DataError: there is no case, or one is wrong.
        StorageError: the cache cannot be written.
    """

    def __init__(self, cases: Sequence[Case], data: SiteData, plan: Plan, cache: Path | None) -> None:
        if not cases:
            raise DataError(f"{data.datalist}: training is empty, but must list at least one case")
        self.cases, self.data, self.plan, self._cache = cases, data, plan, cache
        self._kept: dict[int, PreparedCase] = {}
        budget, lesion = MEMORY_BYTES, False
        for index, case in enumerate(cases):
            prepared = load_case(case, data, plan, cache)
            if prepared.label is None:
                raise DataError(f"case {case.name}: label is missing, but only prediction goes without")
            lesion = lesion or bool(prepared.label.any())
            budget -= prepared.nbytes
            if budget >= 0:
                self._kept[index] = prepared
        if not lesion:
            raise DataError(f"{data.datalist}: every training label is empty, but one at least must mark something")

    @property
    def kept(self) -> list[PreparedCase]:
        """The cases in memory."""
        return [*self._kept.values()]

    def __getitem__(self, index: int) -> PreparedCase:
        kept = self._kept.get(index)
        return kept or load_case(self.cases[index], self.data, self.plan, self._cache)


def _batches(shelf: Shelf, *, seed: int, step: int, items: range) -> Iterator[tuple[Tensor, Tensor]]:
    data, plan = shelf.data, shelf.plan
    size, n = plan.training.batch_size, len(shelf.cases)
    while True:
        chosen = [shelf[order(seed, step * size + item, n)] for item in items]
        parts = [(case.image, case.label) for case in chosen if case.label is not None]
        places = None
        if plan.data.patch is not None:
            draws = (stream(seed, "patch", step, item) for item in items)
            patches = [draw_patch(*part, plan.data, draw) for part, draw in zip(parts, draws, strict=True)]
            parts = [(patch.image, patch.label) for patch in patches]
            places = Places(plan.data.patch, tuple(patch.start for patch in patches))
        images = torch.stack([image for image, _ in parts])  # (B, C, *S)
        labels = torch.stack([label for _, label in parts])  # (B, 1, *S)
        if plan.data.augment:
            images, labels = augmented(images, labels, data.modality, seed=seed, step=step, items=items, places=places)
        yield images, labels
        step += 1


def _check_some_lesion(prepared: Sequence[PreparedCase], data: SiteData) -> None:
    labels = [case.label for case in prepared if case.label is not None]
    if labels and not any(bool(label.any()) for label in labels):
        raise DataError(
            f"{data.datalist}: every label of {len(labels)} cases is empty, but one at least must mark something"
        )
