"""How well masks fit: Dice, IoU, 95 % Hausdorff distance and normalised surface Dice, by MONAI.

Masks are compared on the grid of the case's file, where a reader drew the reference, or, faster, on the
network's. Distances are in millimetres if the spacing of every case is known, otherwise in voxels for all
cases, so that their mean has a unit. MONAI leaves empty masks undefined; here

    both empty          dice 1  iou 1  hd95 0                   nsd 1
    one of them empty   dice 0  iou 0  hd95 the image's diagonal  nsd 0

so that every mean is finite and a missed lesion costs the largest distance there is.
"""

# MONAI takes seconds to import, and the mean Dice while training does not need it
# ruff: noqa: PLC0415

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoap.errors import DataError
from fedoap.segmentation.data import reference, restore
from fedoap.segmentation.prepared import PreparedCase

Predict: TypeAlias = Callable[[Tensor], Tensor]
"""Images (B, C, *S) on the CPU -> logits (B, 1, *S) on any device."""
Where: TypeAlias = Literal["file", "network"]
Unit: TypeAlias = Literal["mm", "voxel"]
TOLERANCE = 2.0
"""Distance up to which two surfaces agree, in the evaluation's unit."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The four measures, of one case or on average."""

    dice: float
    iou: float
    hd95: float
    nsd: float


@dataclass(frozen=True, slots=True)
class CaseScores:
    """One case's measures."""

    name: str
    patient: str
    scores: Scores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measures of a set of cases and their mean over cases."""

    cases: tuple[CaseScores, ...]
    mean: Scores
    unit: Unit
    """Of `hd95` and `tolerance`."""
    tolerance: float
    grid: Where

    def to_json(self) -> dict[str, object]:
        """Return what json.dumps takes: the means, and one entry a case."""
        rows = [{"name": case.name, "patient": case.patient, **asdict(case.scores)} for case in self.cases]
        head = {"unit": self.unit, "tolerance": self.tolerance, "grid": self.grid}
        return {**head, "mean": asdict(self.mean), "cases": rows}


def evaluate(
    predict: Predict,
    cases: Sequence[PreparedCase],
    *,
    grid: Where = "file",
    tolerance: float = TOLERANCE,
    batch_size: int = 8,
) -> Evaluation:
    """Return how well the predicted masks fit the cases' reference masks.

    Raises:
        DataError: there is no case, or one has no mask.
    """
    if not cases:
        raise DataError("evaluation: no case, but at least one is needed")
    spacings = [_spacing_mm(case, grid) for case in cases]
    unit: Unit = "mm" if all(spacing is not None for spacing in spacings) else "voxel"
    rows = []
    for case, probability in zip(cases, probabilities(predict, cases, batch_size), strict=True):
        predicted, expected = _masks(case, probability, grid)
        spacing = _spacing_mm(case, grid) if unit == "mm" else None
        rows.append(CaseScores(case.case.name, case.case.patient, score(predicted, expected, spacing, tolerance)))
    return Evaluation(tuple(rows), _mean(rows), unit, tolerance, grid)


def mean_dice(
    predict: Predict, cases: Sequence[PreparedCase], *, grid: Where = "network", batch_size: int = 8
) -> float:
    """Return the mean Dice alone; the distances take most of the time of `evaluate`.

    Raises:
        DataError: there is no case, or one has no mask.
    """
    if not cases:
        raise DataError("evaluation: no case, but at least one is needed")
    values = []
    for case, probability in zip(cases, probabilities(predict, cases, batch_size), strict=True):
        predicted, expected = (mask > 0 for mask in _masks(case, probability, grid))
        total = int(predicted.sum()) + int(expected.sum())
        values.append(2 * int((predicted & expected).sum()) / total if total else 1.0)
    return math.fsum(values) / len(values)


def score(
    predicted: NDArray[np.uint8], expected: NDArray[np.uint8], spacing: tuple[float, ...] | None, tolerance: float
) -> Scores:
    """Return the measures of one mask (*S) of 0 and 1; distances in the unit of `spacing`, or in voxels.

    Raises:
        ValueError: the masks differ in shape.
    """
    if predicted.shape != expected.shape:
        raise ValueError(f"predicted mask is {predicted.shape}, but the expected one is {expected.shape}")
    if not predicted.any() or not expected.any():
        alike = not predicted.any() and not expected.any()
        lengths = [n * step for n, step in zip(expected.shape, spacing or (1.0,) * expected.ndim, strict=True)]
        return Scores(1.0, 1.0, 0.0, 1.0) if alike else Scores(0.0, 0.0, math.hypot(*lengths), 0.0)
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.meaniou import compute_iou
    from monai.metrics.surface_dice import compute_surface_dice

    ours, theirs = (torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (predicted, expected))
    with warnings.catch_warnings():
        # MONAI 1.5 and 1.6 pass an argument to themselves that they warn of
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        hd95 = compute_hausdorff_distance(ours, theirs, include_background=True, percentile=95, spacing=spacing)
        nsd = compute_surface_dice(ours, theirs, [tolerance], include_background=True, spacing=spacing)
    return Scores(float(compute_dice(ours, theirs)), float(compute_iou(ours, theirs)), float(hd95), float(nsd))


def probabilities(predict: Predict, cases: Sequence[PreparedCase], batch_size: int = 8) -> Iterator[Tensor]:
    """Yield each case's probabilities (*S) on the network's grid, on the CPU."""
    for start in range(0, len(cases), batch_size):
        images = torch.stack([case.image for case in cases[start : start + batch_size]])
        with torch.inference_mode():  # not around the yield, which would leave it on for the caller
            batch = torch.sigmoid(predict(images).float()).cpu()[:, 0]
        yield from batch


def _masks(case: PreparedCase, probability: Tensor, grid: Where) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if grid == "file":
        shape = case.geometry.grid.shape
        return restore(probability, case).reshape(shape), reference(case).reshape(shape)
    return (probability >= 0.5).numpy().astype(np.uint8), _label(case).numpy().astype(np.uint8)


def _label(case: PreparedCase) -> Tensor:
    if case.label is None:
        raise DataError(f"case {case.case.name}: label is missing, but only prediction goes without")
    return case.label[0]


def _spacing_mm(case: PreparedCase, grid: Where) -> tuple[float, ...] | None:
    geometry = case.geometry
    return geometry.network_spacing_mm if grid == "network" else geometry.grid.file_spacing_mm


def _mean(rows: Sequence[CaseScores]) -> Scores:
    columns = zip(*(astuple(row.scores) for row in rows), strict=True)
    return Scores(*(math.fsum(values) / len(rows) for values in columns))
