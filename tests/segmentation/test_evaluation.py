"""Measures of masks, against numbers worked out by hand."""

import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedoap.config import DataConfig, NetworkConfig, Plan, SiteData
from fedoap.errors import DataError
from fedoap.segmentation.data import PreparedCase, prepared_cases
from fedoap.segmentation.datalist import Case
from fedoap.segmentation.evaluation import Scores, evaluate, mean_dice, probabilities, score

SHAPE = (16, 16)


def square(start: int, stop: int, left: int = 4, right: int = 8) -> NDArray[np.uint8]:
    mask = np.zeros(SHAPE, np.uint8)
    mask[start:stop, left:right] = 1
    return mask


EMPTY = square(0, 0)


def cases(folder: Path, *masks: NDArray[np.uint8], affine: NDArray[np.float64] | None = None) -> list[PreparedCase]:
    """Images that are bright where their mask is."""
    made = []
    for index, mask in enumerate(masks):
        image = np.random.default_rng(index).integers(20, 60, mask.shape).astype(np.uint8) + 150 * mask
        names = [folder / f"{index}-{what}.{'png' if affine is None else 'nii'}" for what in ("image", "mask")]
        for name, values in zip(names, (image, mask), strict=True):
            if affine is None:
                Image.fromarray(values).save(name)
            else:
                nibabel.save(nibabel.Nifti1Image(values, affine), name)
        made.append(Case(names[0], names[1], f"p{index}", f"c{index}"))
    size = (16,) * masks[0].ndim
    network = NetworkConfig(width=4, depth=2, dimensions=2 if len(size) == 2 else 3)
    plan = Plan(federation="f", network=network, data=DataConfig(size=size))
    return prepared_cases(made, SiteData(datalist=folder / "l.json", window=(0, 255)), plan)


def bright(images: Tensor) -> Tensor:
    """Logits of a network that finds what is bright."""
    return 50 * (images - images.new_tensor(4 * 100 / 255 - 2))


def nothing(images: Tensor) -> Tensor:
    return torch.full_like(images, -9.0)


def test_two_overlapping_squares_have_the_measures_worked_out_by_hand() -> None:
    # 4 x 4 voxels each, the second two rows lower: 8 in common, 24 in either
    found = score(square(4, 8), square(6, 10), None, tolerance=1.0)

    assert found.dice == pytest.approx(16 / 32)
    assert found.iou == pytest.approx(8 / 24)
    # of each border of 12 voxels the outermost row of 4 is 2 away from the other border, 8 are at most 1 away
    assert found.hd95 == pytest.approx(2.0)
    assert found.nsd == pytest.approx(16 / 24)


def test_distances_are_in_the_unit_of_the_spacing() -> None:
    assert score(square(4, 8), square(6, 10), (0.5, 3.0), 1.0).hd95 == pytest.approx(1.0)


def test_the_measures_agree_with_a_slow_count_on_noise() -> None:
    """Seen failing with the largest distance for the 95th percentile, and with the spacing left out."""
    random = np.random.default_rng(4)
    for _ in range(5):
        ours, theirs = (_lump(random) for _ in range(2))
        found = score(ours, theirs, (2.0, 0.7), 1.5)
        both = int((ours & theirs).sum())
        assert found.dice == pytest.approx(2 * both / int(ours.sum() + theirs.sum()))
        assert found.iou == pytest.approx(both / int((ours | theirs).sum()))
        there, back = _distances(ours, theirs, (2.0, 0.7)), _distances(theirs, ours, (2.0, 0.7))
        assert found.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-4)
        assert found.nsd == pytest.approx((np.concatenate([there, back]) <= 1.5).mean(), rel=1e-4)


def test_two_empty_masks_agree_in_everything() -> None:
    assert score(EMPTY, EMPTY, None, 2.0) == Scores(1.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(("ours", "theirs"), [(EMPTY, square(4, 8)), (square(4, 8), EMPTY)])
def test_a_missed_or_invented_lesion_costs_the_images_diagonal(
    ours: NDArray[np.uint8], theirs: NDArray[np.uint8]
) -> None:
    assert score(ours, theirs, (1.0, 2.0), 2.0) == Scores(0.0, 0.0, math.hypot(16, 32), 0.0)


def test_a_perfect_network_scores_perfectly_on_both_grids(tmp_path: Path) -> None:
    prepared = cases(tmp_path, square(4, 8), square(2, 9))

    for grid in ("file", "network"):
        found = evaluate(bright, prepared, grid=grid)
        assert found.mean == Scores(1.0, 1.0, 0.0, 1.0)
        assert found.unit == "voxel"


def test_means_are_over_cases_and_the_quick_dice_agrees(tmp_path: Path) -> None:
    prepared = cases(tmp_path, square(4, 8), EMPTY, square(2, 9))

    found = evaluate(nothing, prepared, batch_size=2)

    assert [case.scores.dice for case in found.cases] == [0.0, 1.0, 0.0]
    assert found.mean.dice == pytest.approx(1 / 3)
    assert mean_dice(nothing, prepared) == pytest.approx(1 / 3)
    assert mean_dice(bright, prepared) == 1.0


def test_distances_are_in_millimetres_where_every_spacing_is_known(tmp_path: Path) -> None:
    mask = np.zeros((8, 16, 16), np.uint8)
    mask[2:6, 4:9, 4:9] = 1
    prepared = cases(tmp_path, mask, affine=np.diag([4.0, 2.0, 2.0, 1.0]))

    found = evaluate(nothing, prepared)

    assert found.unit == "mm"
    assert found.mean.hd95 == pytest.approx(math.sqrt(3) * 32)
    assert evaluate(bright, prepared).mean.dice == 1.0


def test_one_unknown_spacing_makes_voxels_of_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    slices = cases(tmp_path / "a", square(4, 8)[:, :], affine=np.diag([3.0, 3.0, 3.0, 1.0]))
    prepared = [*slices, *cases(tmp_path, square(4, 8))]

    assert evaluate(nothing, slices).unit == "mm"
    assert evaluate(nothing, prepared).unit == "voxel"
    assert evaluate(nothing, prepared).mean.hd95 == pytest.approx(math.hypot(16, 16))


def test_the_files_grid_is_finer_than_the_networks(tmp_path: Path) -> None:
    mask = np.zeros((64, 32), np.uint8)
    mask[20:45, 8:21] = 1
    prepared = cases(tmp_path, mask)

    found = evaluate(bright, prepared)

    assert 0.9 < found.mean.dice < 1
    assert found.mean.hd95 <= 2.5
    assert mean_dice(bright, prepared, grid="file") == pytest.approx(found.mean.dice)
    assert mean_dice(bright, prepared) == 1.0


def test_who_asks_for_probabilities_can_train_between_two_of_them(tmp_path: Path) -> None:
    """Planted bug: inference mode left on between a batch's cases, in which nothing has a gradient."""
    found = probabilities(bright, cases(tmp_path, square(4, 8), square(2, 9)))

    next(found)

    assert not torch.is_inference_mode_enabled()


def test_an_evaluation_becomes_json(tmp_path: Path) -> None:
    found = evaluate(bright, cases(tmp_path, square(4, 8)), tolerance=1.0)

    values = json.loads(json.dumps(found.to_json()))

    assert values["mean"]["dice"] == 1.0
    assert values["tolerance"] == 1.0
    assert values["cases"][0] == {"name": "c0", "patient": "p0", "dice": 1.0, "iou": 1.0, "hd95": 0.0, "nsd": 1.0}


def test_an_evaluation_needs_cases_with_masks(tmp_path: Path) -> None:
    (prepared,) = cases(tmp_path, square(4, 8))
    blind = PreparedCase(prepared.image, None, Case(prepared.case.image, None, "p", "blind"), prepared.geometry)

    with pytest.raises(DataError, match="evaluation: no case"):
        evaluate(bright, [])
    with pytest.raises(DataError, match="case blind: label is missing"):
        evaluate(bright, [blind])
    with pytest.raises(DataError, match="case blind: label is missing"):
        mean_dice(bright, [blind])


def _lump(random: np.random.Generator) -> NDArray[np.uint8]:
    mask = np.zeros(SHAPE, np.uint8)
    for _ in range(3):
        down, across = random.integers(0, 11, 2)
        mask[down : down + random.integers(2, 6), across : across + random.integers(2, 6)] = 1
    return mask


def _border(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Voxels of a mask with a neighbour, along an axis, outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner.astype(bool)).astype(float)


def _distances(
    ours: NDArray[np.uint8], theirs: NDArray[np.uint8], spacing: tuple[float, float] = (1.0, 1.0)
) -> NDArray[np.float64]:
    steps = (_border(ours)[:, None] - _border(theirs)[None]) * np.asarray(spacing)
    return np.asarray(np.sqrt((steps**2).sum(-1)).min(1))
