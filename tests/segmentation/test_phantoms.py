"""Invented patients: the same from the same seed, readable as data, and no threshold finds the lesions."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedoap.config import DataConfig, NetworkConfig, Plan, SiteData
from fedoap.errors import DataError
from fedoap.segmentation.data import prepared_cases
from fedoap.segmentation.datalist import SPLITS, Split, load_datalist
from fedoap.segmentation.phantoms import KINDS, ORGANS, Organ, phantom, write_phantoms

COUNTS: Mapping[Split, int] = {"training": 3, "validation": 2, "test": 1}


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def best_threshold(values: NDArray[np.float64], mask: NDArray[np.bool_]) -> float:
    """The Dice of the best of 100 thresholds, from either side."""
    best = 0.0
    for cut in np.unique(np.percentile(values, np.linspace(0, 100, 101))):
        for found in (values >= cut, values <= cut):
            best = max(best, 2 * float((found & mask).sum()) / float(found.sum() + mask.sum()))
    return best


@pytest.mark.parametrize("organ", ORGANS)
def test_no_threshold_finds_the_lesions(organ: Organ) -> None:
    drawn = [phantom(organ, (96, 96), 0, patient, 0) for patient in range(16)]
    values = np.stack([one.image.astype(float) for one in drawn])
    mask = np.stack([one.label > 0 for one in drawn])

    standardised = (values - values.mean((1, 2), keepdims=True)) / values.std((1, 2), keepdims=True)

    assert best_threshold(values, mask) < 0.5
    assert best_threshold(standardised, mask) < 0.5


@pytest.mark.parametrize("organ", ORGANS)
def test_every_phantom_has_a_lesion_of_some_size(organ: Organ) -> None:
    shares = [phantom(organ, (64, 64), 1, patient, part).label.mean() for patient in range(12) for part in range(2)]

    assert min(shares) > 0.001
    assert max(shares) < 0.25
    assert max(shares) > 3 * min(shares)


@pytest.mark.parametrize("organ", ORGANS)
def test_phantoms_are_a_datalist_that_loads(tmp_path: Path, organ: Organ) -> None:
    path = write_phantoms(tmp_path / organ, organ, COUNTS, (64, 48), seed=0)
    data = SiteData(datalist=path, modality=KINDS[organ].modality)
    plan = Plan(federation="f", network=NetworkConfig(depth=2), data=DataConfig(size=(32, 32)))

    lists = {split: load_datalist(data, split) for split in SPLITS}

    assert {split: len(cases) for split, cases in lists.items()} == COUNTS
    assert len({case.patient for case in lists["training"]}) == 2
    assert len(prepared_cases(lists["training"], data, plan)) == 3


@pytest.mark.parametrize("organ", ORGANS)
def test_volumes_are_written_as_nifti_with_millimetres(tmp_path: Path, organ: Organ) -> None:
    path = write_phantoms(tmp_path, organ, {"training": 1}, (40, 48, 32), seed=0)
    data = SiteData(datalist=path, modality=KINDS[organ].modality)
    network = NetworkConfig(dimensions=3, depth=2)
    plan = Plan(federation="f", network=network, data=DataConfig(size=(32, 32, 32)))

    (prepared,) = prepared_cases(load_datalist(data, "training"), data, plan)

    assert prepared.geometry.grid.file_shape == (48, 40, 32)
    assert prepared.geometry.grid.spacing_mm == (2.0, 2.0, 2.5)
    assert prepared.label is not None
    assert prepared.label.any()


def test_the_seed_fixes_every_byte(tmp_path: Path) -> None:
    """Seen failing with the lesions drawn from NumPy's own entropy."""
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_phantoms(tmp_path / name, "lung-ct", COUNTS, (48, 48), seed)

    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_patients_images_share_their_anatomy_and_nothing_else() -> None:
    """Seen failing with one stream for all images of a patient, and with one for each image's anatomy."""
    ours, theirs = (phantom("brain-mr", (64, 64), 0, 3, part) for part in range(2))
    other = phantom("brain-mr", (64, 64), 0, 4, 0)
    healthy = (ours.label + theirs.label + other.label) == 0

    def likeness(one: NDArray[np.uint8], two: NDArray[np.uint8]) -> float:
        return float(np.corrcoef(one[healthy], two[healthy])[0, 1])

    assert not np.array_equal(ours.label, theirs.label)
    assert likeness(ours.image, theirs.image) > likeness(ours.image, other.image)


def test_the_lists_of_two_organs_share_no_name(tmp_path: Path) -> None:
    names = []
    for organ in ORGANS:
        values = json.loads(write_phantoms(tmp_path / organ, organ, COUNTS, (32, 32), 0).read_text())
        names += [row["image"] for split in COUNTS for row in values[split]]

    assert len(set(names)) == 4 * 6


@pytest.mark.parametrize(
    ("organ", "size", "text"),
    [("heart-mr", (64, 64), "organ is 'heart-mr', but must be one of brain-mr"), ("brain-mr", (16, 64), "size is")],
)
def test_an_unknown_organ_or_a_small_size_is_refused(
    tmp_path: Path, organ: str, size: tuple[int, ...], text: str
) -> None:
    with pytest.raises(DataError, match=text):
        write_phantoms(tmp_path, organ, COUNTS, size, 0)  # type: ignore[arg-type]


def test_a_hospital_s_own_datalist_is_not_replaced_by_phantoms(tmp_path: Path) -> None:
    """Planted bug: written over, without a word."""
    (tmp_path / "datalist.json").write_text('{"training": [{"image": "real.png", "label": "real-mask.png"}]}')

    with pytest.raises(DataError, match=r"datalist.json: is not of phantoms, so it is not written over"):
        write_phantoms(tmp_path, "liver-ct", {"training": 1}, (32, 32), seed=0)

    assert "real.png" in (tmp_path / "datalist.json").read_text()


def test_phantoms_may_be_drawn_again_over_phantoms(tmp_path: Path) -> None:
    again = [write_phantoms(tmp_path, "liver-ct", {"training": count}, (32, 32), seed=0) for count in (2, 1)]

    assert len(json.loads(again[-1].read_text())["training"]) == 1
