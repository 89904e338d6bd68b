"""Cases dealt by patient: properties that any grouping of cases must have."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedoap.errors import DataError
from fedoap.segmentation.datalist import SPLITS, Case
from fedoap.study.config import Hospital
from fedoap.study.folds import Member, dealt, fold_of, split_by_fold
from fedoap.study.partition import shared_out

PATIENTS = st.lists(st.integers(1, 9), min_size=3, max_size=30)
"""Cases of each patient."""


def members(patients: list[int]) -> tuple[Member, ...]:
    """Return cases of so many patients, a patient's cases apart from one another as a datalist may have them."""
    owners = sorted((turn, patient) for patient, cases in enumerate(patients) for turn in range(cases))
    return tuple(
        Member(Case(Path(f"{n}.png"), Path(f"m{n}.png"), str(patient), str(n)), n, patient, SPLITS[patient % 3])
        for n, (_, patient) in enumerate(owners)
    )


def can_be_dealt(listed: tuple[Member, ...], folds: int, seed: int) -> bool:
    """Return whether the patients suffice for so many folds."""
    try:
        fold_of(listed, folds, seed)
    except DataError:
        return False
    return True


@given(PATIENTS, st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_case_is_tested_in_exactly_one_fold(patients: list[int], folds: int, seed: int) -> None:
    """Planted bug: a seed of each fold, so that who is tested depends on which is asked for."""
    listed = members(patients)
    assume(can_be_dealt(listed, folds, seed))

    tested = Counter(
        member.number
        for fold in range(folds)
        for member in split_by_fold(listed, folds, fold, seed=seed, validation=0.15)["test"]
    )

    assert tested == Counter(range(len(listed)))


@given(PATIENTS, st.integers(2, 6), st.integers(0, 99), st.floats(0.01, 0.5))
@settings(max_examples=60, deadline=None)
def test_no_patient_is_shared_and_no_list_is_empty(
    patients: list[int], folds: int, seed: int, validation: float
) -> None:
    """Planted bugs: validation cut by case; validation that takes all that is left."""
    assume(can_be_dealt(members(patients), folds, seed))

    for fold in range(folds):
        split = split_by_fold(members(patients), folds, fold, seed=seed, validation=validation)
        owners = [{member.patient for member in split[name]} for name in SPLITS]

        assert all(owners)
        assert not owners[0] & owners[1]
        assert not owners[2] & (owners[0] | owners[1])
        assert sum(len(split[name]) for name in SPLITS) == sum(patients)


@given(PATIENTS, st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_folds_differ_by_no_more_than_the_largest_patient(patients: list[int], folds: int, seed: int) -> None:
    """Planted bug: patients dealt in turn, whatever their cases."""
    sizes = dict(enumerate(patients))

    held = Counter(dict.fromkeys(range(folds), 0))
    for patient, place in dealt(sizes, [1 / folds] * folds, seed, "folds").items():
        held[place] += sizes[patient]

    assert max(held.values()) - min(held.values()) <= max(patients)


def test_the_seed_decides_who_is_tested() -> None:
    """Planted bug: a seed that is not used."""
    listed = members([1] * 20)

    first, again, other = (fold_of(listed, 5, seed) for seed in (0, 0, 1))

    assert first == again
    assert first != other


def test_the_datalists_own_split_is_kept_without_folds() -> None:
    listed = members([2, 3, 4])

    split = split_by_fold(listed, 0, 0, seed=0, validation=0.15)

    assert {name: [m.patient for m in split[name]] for name in SPLITS} == {
        "training": [0, 0],
        "validation": [1, 1, 1],
        "test": [2, 2, 2, 2],
    }


def test_validation_is_as_near_to_its_share_as_patients_allow() -> None:
    """Planted bug: patients taken until the share is passed."""
    few, more = (split_by_fold(members([18] * 13), 5, 0, seed=0, validation=share) for share in (0.14, 0.16))

    assert [len(few[name]) // 18 for name in SPLITS] == [9, 1, 3]
    assert [len(more[name]) // 18 for name in SPLITS] == [8, 2, 3]


@pytest.mark.parametrize(("patients", "folds"), [([4, 4], 3), ([4, 4, 4], 2)])
def test_too_few_patients_are_one_line(patients: list[int], folds: int) -> None:
    """Of three patients and two folds, one has two to test and leaves one for two lists."""
    with pytest.raises(DataError, match=f"{len(patients)} patients cannot make {folds} folds"):
        split_by_fold(members(patients), folds, 0, seed=0, validation=0.15)


@given(PATIENTS, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_partition_gives_each_patient_to_one_hospital(patients: list[int], weights: list[int], by_list: bool) -> None:
    """Planted bug: what no share is for goes to the last hospital."""
    hospitals = {f"h{n}": Hospital(share=weight / (sum(weights) + 5)) for n, weight in enumerate(weights)}

    shared = shared_out(members(patients), hospitals, seed=0, by_list=by_list)

    owners = [patient for held in shared.values() for patient in {member.patient for member in held}]
    assert len(owners) == len(set(owners))
    total, largest = sum(patients), max(patients)
    for name, held in shared.items():
        assert len(held) <= hospitals[name].share * total + largest * (3 if by_list else 1)
