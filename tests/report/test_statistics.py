"""Means, intervals and tests against values worked by hand."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoap.report.statistics import (
    Comparison,
    Estimate,
    compare,
    correct,
    holm,
    mean_interval,
    share,
    signed_rank,
    stratified_interval,
)

DIFFERENCES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=4)


def test_an_interval_is_student_s() -> None:
    """Of 2, 4, 6, 8: mean 5, s = sqrt(20/3), t(0.975, 3) = 3.182446. Planted bug: `ddof=0`."""
    found = mean_interval([2, 4, 6, 8])

    assert found is not None
    assert found.mean == 5
    assert found.margin == pytest.approx(3.182446 * math.sqrt(20 / 3) / 2, rel=1e-6)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert mean_interval([0.5]) == Estimate(0.5, None, None, 1)
    assert mean_interval([]) is None
    assert mean_interval([0.5, 0.5]) == Estimate(0.5, 0.5, 0.5, 2)


def test_sites_weigh_the_same_whatever_their_patients() -> None:
    """Site means 1 and 5, variances of the means 2/2 and 4/4; both 1, so freedom is 2^2/(1/1 + 1/3) = 3.

    t(0.975, 3) = 3.182446; the mean of two has a standard error of sqrt(2)/2. Planted bug: the values of all sites
    pooled.
    """
    found = stratified_interval([[0, 2], [5 - math.sqrt(3), 5 - math.sqrt(3), 5 + math.sqrt(3), 5 + math.sqrt(3)]])

    assert found is not None
    assert found.mean == pytest.approx(3)
    assert found.count == 6
    assert found.margin == pytest.approx(3.182446 * math.sqrt(2) / 2, rel=1e-6)


def test_a_site_without_patients_leaves_no_mean_over_sites_and_one_with_one_no_interval() -> None:
    assert stratified_interval([[1.0, 2.0], []]) is None
    assert stratified_interval([[1.0, 2.0], [3.0]]) == Estimate(2.25, None, None, 3)


@pytest.mark.parametrize(
    ("differences", "correlation", "p"),
    [
        ([1, 2, 3, 4, 5, 6], 1.0, 2 / 64),
        ([-1, -2, -3, -4, -5, -6], -1.0, 2 / 64),
        ([1, -2, 3, 4, 5, 6], (21 - 4) / 21, 6 / 64),  # sums of at most 2: {}, {1}, {2}
        ([0, 0, 0], 0.0, 1.0),
        ([0, 1], 2 / 3, 1.0),  # the zero has rank 1 and no sign
        ([0.1 + 0.2, -0.3], 0.0, 1.0),  # the same size but for rounding
    ],
)
def test_one_site_is_wilcoxon_s_test(differences: Sequence[float], correlation: float, p: float) -> None:
    """Planted bug: differences that are not rounded."""
    assert signed_rank([differences]) == pytest.approx((correlation, p))


@given(st.lists(DIFFERENCES, min_size=2, max_size=3))
def test_few_pairs_of_several_sites_are_counted(groups: list[list[float]]) -> None:
    """Planted bugs: the normal approximation for two pairs; sums that are not rounded before they are compared."""
    correlation, p = signed_rank(groups)

    weights = [weight for group in groups for weight in _by_hand(group)]
    signs = [np.sign(value) for group in groups for value in group]
    seen = math.fsum(sign * weight for sign, weight in zip(signs, weights, strict=True))
    sums = [
        math.fsum(sign * abs(real) * weight for sign, real, weight in zip(flipped, signs, weights, strict=True))
        for flipped in itertools.product((-1, 1), repeat=len(weights))
    ]
    as_far = sum(each >= abs(seen) - 1e-9 for each in sums) / len(sums)
    assert correlation == pytest.approx(seen / len(groups))
    assert p == pytest.approx(min(1.0, 2 * as_far))


def test_many_pairs_of_several_sites_are_near_the_normal_law() -> None:
    """Two sites, all 10 differences positive: z = 2 / sqrt(2 * sum(j^2) / 55^2), sum(j^2) to 10 = 385."""
    correlation, p = signed_rank([list(range(1, 11))] * 2)

    z = 2 / math.sqrt(2 * 385 / 55**2)
    assert correlation == pytest.approx(1)
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)))


def test_holm_s_correction_steps_down() -> None:
    """Of 0.01, 0.04, 0.03, 0.005: 4 x .005, 3 x .01, 2 x .03, and .06 again. Planted bug: no running maximum."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.sampled_from([None, 0.004, 0.009, 0.011, 0.013, 0.016, 0.02, 0.03, 0.2]), max_size=6))
def test_holm_rejects_what_the_definition_rejects(values: list[float | None]) -> None:
    """Planted bug: the untested counted in the family's size."""
    tested = sorted(p for p in values if p is not None)
    kept = next((i for i, p in enumerate(tested) if p * (len(tested) - i) >= 0.05), len(tested))
    rejected = tested[:kept]

    adjusted = holm(values)

    assert sorted(p for p, q in zip(values, adjusted, strict=True) if p is not None and q is not None and q < 0.05) == (
        rejected
    )
    assert all((p is None) == (q is None) for p, q in zip(values, adjusted, strict=True))


def test_a_verdict_needs_significance_and_both_sides_to_agree() -> None:
    """Planted bug: the verdict of p alone."""
    effect = Estimate(-0.1, -0.2, 0.0, 9)

    assert Comparison(effect, 0.001, -0.9, 1, adjusted=0.01).verdict == "worse"
    assert Comparison(effect, 0.001, -0.9, -1, adjusted=0.01).verdict == "better"
    assert Comparison(effect, 0.001, 0.9, 1, adjusted=0.01).verdict == "tied"
    assert Comparison(effect, 0.02, -0.9, 1, adjusted=0.08).verdict == "tied"
    assert Comparison(effect, None, 0.0, 1).verdict == "untested"


def test_a_family_is_corrected_together_and_leaves_out_what_has_no_pairs() -> None:
    six = compare([[1, 2, 3, 4, 5, 6]], 1)
    seven = compare([[1, 2, 3, 4, 5, 6, 7]], 1)

    found = correct({"six": six, "seven": seven, "none": compare([[]], 1)})

    assert {key: each.adjusted for key, each in found.items()} == {
        "seven": pytest.approx(2 * 2 / 128),
        "six": pytest.approx(2 / 64),
    }


def test_a_share_is_the_ratio_of_the_sites_mean_gains() -> None:
    """(1 + 3) / (2 + 4) of site means 1 of 2 and 3 of 4; exact at each patient, so the interval has no width."""
    exact = share([([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]), ([3.0, 3.0], [4.0, 4.0])])

    assert exact is not None
    assert (exact.mean, exact.low, exact.high) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert share([([1.0], [2.0])]) == Estimate(0.5, None, None, 1)
    assert share([([1.0, 1.0], [0.0, 0.0])]) is None
    assert share([([], [])]) is None


def test_a_share_s_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Planted bug: sites resampled as one, unpaired."""
    draw = np.random.default_rng(5)
    found = [share(_gains(draw)) for _ in range(60)]
    intervals = [(each.low, each.high) for each in found if each and each.low is not None and each.high is not None]

    assert len(intervals) == 60
    assert sum(low <= 0.6 <= high for low, high in intervals) >= 52
    assert max(high - low for low, high in intervals) < 0.18


def _gains(draw: np.random.Generator) -> list[tuple[list[float], list[float]]]:
    """Return two sites' gains, of which a part is 0.6 of the whole."""
    whole = [draw.normal(0.1, 0.05, 25), draw.normal(0.2, 0.05, 15)]
    return [((0.6 * each + draw.normal(0, 0.02, each.size)).tolist(), each.tolist()) for each in whole]


def _by_hand(group: Sequence[float]) -> list[float]:
    """Return each value's share of the ranks: what lies below it, and half of its equals with it."""
    sizes = [abs(value) for value in group]
    ranks = [sum(b < a for b in sizes) + (sum(b == a for b in sizes) + 1) / 2 for a in sizes]
    return [rank / sum(ranks) for rank in ranks]
