"""Which cases train, validate and test: folds, divided by patient.

A site's cases are the union of its lists, numbered in their order; a study's tables know a case and a
patient by these numbers only. Patients are never split. Those with most cases are assigned first, each to
the part that lacks most cases, so that folds hold about equally many; the order among patients with equally
many cases is random. Everything follows from a seed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedoap.config import SiteData
from fedoap.errors import DataError
from fedoap.segmentation.datalist import Case, Split, load_all
from fedoap.segmentation.streams import stream


@dataclass(frozen=True, slots=True)
class Member:
    """A case of the union of a site's lists."""

    case: Case
    number: int
    patient: int
    split: Split
    """The list it stands in."""


def union(data: SiteData) -> tuple[Member, ...]:
    """Return all cases of a site's lists, numbered.

    Raises:
        DataError: the datalist is wrong.
    """
    listed = load_all(data)
    patients: dict[str, int] = {}
    return tuple(
        Member(case, number, patients.setdefault(case.patient, len(patients)), split)
        for number, (split, case) in enumerate(listed)
    )


def dealt(sizes: Mapping[int, int], shares: Sequence[float], seed: int, purpose: str) -> dict[int, int]:
    """Return which share each patient goes to, given the patients' numbers of cases.

    >>> dealt({0: 3, 1: 1, 2: 2, 3: 2}, [0.5, 0.5], seed=0, purpose="doctest")
    {0: 0, 3: 1, 2: 1, 1: 0}
    """
    patients = [list(sizes)[place] for place in stream(seed, purpose).permutation(len(sizes))]
    missing = [share * sum(sizes.values()) for share in shares]
    places: dict[int, int] = {}
    for patient in sorted(patients, key=lambda patient: -sizes[patient]):
        places[patient] = max(range(len(shares)), key=missing.__getitem__)
        missing[places[patient]] -= sizes[patient]
    return places


def fold_of(members: Sequence[Member], folds: int, seed: int) -> dict[int, int]:
    """Return the fold in which each patient is tested.

    Raises:
        DataError: there are too few patients to test, validate and train in every fold.
    """
    sizes = Counter(member.patient for member in members)
    places = dealt(sizes, [1 / folds] * folds, seed, "folds")
    left = len(sizes) - max(Counter(places.values()).values())
    if len(sizes) < folds or left < 2:
        raise DataError(
            f"{len(sizes)} patients cannot make {folds} folds: each needs one to test and two to validate and train"
        )
    return places


def split_by_fold(
    members: Sequence[Member], folds: int, fold: int, *, seed: int, validation: float
) -> dict[Split, list[Member]]:
    """Return the three lists of one fold; training lists patient after patient, in random order.

    Args:
        members: A site's cases.
        folds: Their number; 0 returns the site's own lists.
        fold: The one that is tested.
        seed: Fixes everything.
        validation: Share of the remaining cases that validate, met as closely as whole patients allow.

    Raises:
        DataError: there are too few patients.
    """
    if not folds:
        return {name: [m for m in members if m.split == name] for name in ("training", "validation", "test")}
    places = fold_of(members, folds, seed)
    sizes = Counter(member.patient for member in members if places[member.patient] != fold)
    order = [list(sizes)[place] for place in stream(seed, "validation", fold).permutation(len(sizes))]
    chosen = _choosing(order, sizes, validation)
    rest = [patient for patient in order if patient not in chosen]
    return {
        "training": [member for patient in rest for member in members if member.patient == patient],
        "validation": [member for member in members if member.patient in chosen],
        "test": [member for member in members if places[member.patient] == fold],
    }


def _choosing(order: Sequence[int], sizes: Mapping[int, int], share: float) -> frozenset[int]:
    """Return the patients that validate: at least one, and never all, as the share is at most a half."""
    target, count = share * sum(sizes.values()), 0
    chosen = []
    for patient in order:
        if abs(count + sizes[patient] - target) < abs(count - target):
            chosen.append(patient)
            count += sizes[patient]
    return frozenset(chosen or [min(order, key=sizes.__getitem__)])
