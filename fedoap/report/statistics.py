"""What a study's page says about means and differences: intervals, paired tests, correction for multiple tests.

A value stands for a run (a fold or a seed) or for a patient, never for an image: the images of a patient resemble
each other, so they count once (Altman & Bland 1997, "Units of analysis", BMJ 314:1874). Groups are sites.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
ALPHA = 0.05
RESAMPLES = 4999
COUNTED_PAIRS = 12
FEWEST_PAIRS = 6
"""With five pairs the smallest two-sided p of the signed-rank test is 2 / 2**5 = 0.0625."""

Verdict = Literal["better", "worse", "tied", "untested"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval, which is unknown if there are too few values for one."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def margin(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far one variant is from another over the same patients."""

    effect: Estimate
    """Mean difference, the other subtracted."""
    p: float | None
    """Of the two-sided signed-rank test; None if there is nothing to test."""
    correlation: float
    """The rank-biserial one: its sign tells on which side most of the ranks are."""
    sign: int
    """1 where more is better, -1 where less is."""
    adjusted: float | None = None
    """p after Holm's correction."""

    @property
    def verdict(self) -> Verdict:
        """Significant only if mean and ranks agree on the side: of skewed differences either alone may mislead."""
        if self.adjusted is None:
            return "untested"
        if self.adjusted >= ALPHA or self.effect.mean * self.correlation <= 0:
            return "tied"
        return "better" if self.effect.mean * self.sign > 0 else "worse"


def mean_interval(values: Sequence[float]) -> Estimate | None:
    """Return the mean with Student's t-interval: None without values, no interval of a single value.

    >>> mean_interval([1.0, 2.0, 3.0])  # 2 +- 4.303 / sqrt(3)
    Estimate(mean=2.0, low=-0.484..., high=4.484..., count=3)
    """
    return stratified_interval([values])


def stratified_interval(groups: Sequence[Sequence[float]]) -> Estimate | None:
    """Return the mean of the groups' means, each group weighing the same; None if a group is empty.

    The groups are independent, so their means' variances add up; degrees of freedom after Satterthwaite (1946),
    "An approximate distribution of estimates of variance components", Biometrics Bulletin 2:110. With one group
    this is Student's t-interval.
    """
    if not groups or not all(len(group) for group in groups):
        return None
    mean = float(np.mean([np.mean(group) for group in groups]))
    count = sum(len(group) for group in groups)
    if any(len(group) < 2 for group in groups):
        return Estimate(mean, None, None, count)
    variances = np.array([np.var(group, ddof=1) / len(group) for group in groups])
    freedom = np.array([len(group) - 1 for group in groups])
    if not variances.any():
        return Estimate(mean, mean, mean, count)
    degrees = variances.sum() ** 2 / (variances**2 / freedom).sum()
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * np.sqrt(variances.sum()) / len(groups))
    return Estimate(mean, mean - margin, mean + margin, count)


def signed_rank(groups: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Return the rank-biserial correlation and the two-sided p of the Wilcoxon signed-rank test, None without values.

    The correlation is the sum of signed ranks over the sum of ranks, from -1 to 1. Zeros are ranked and then left
    out (Pratt 1959, JASA 54:655); if all are zero, p is 1. Several groups are ranked separately, and the mean of
    their correlations is tested, each group with the same weight: under the null hypothesis the signs are independent
    (Wilcoxon 1945, Biometrics Bulletin 1:80; strata as in van Elteren 1960 for two samples, Bull. Int. Stat. Inst.
    37:351, there with other weights). For one group SciPy decides between the exact distribution and a normal
    approximation with continuity correction. Of several groups with up to twelve pairs in all, every arrangement of
    signs is counted; above that the normal approximation serves, uncorrected.

    >>> signed_rank([[1, 2, 3, 4]])  # one arrangement of signs in 16 is as far to either side
    (1.0, 0.125)
    """
    rounded = [_rounded(group) for group in groups if len(group)]
    if not rounded:
        return 0.0, None
    ranks = [stats.rankdata(np.abs(each)) for each in rounded]
    weighted = [each / each.sum() / len(rounded) for each in ranks]  # of each group's correlation in the mean
    signed = np.concatenate([np.sign(each) * weight for each, weight in zip(rounded, weighted, strict=True)])
    correlation = float(signed.sum())
    if not signed.any():
        return 0.0, 1.0
    if len(rounded) == 1:
        return correlation, float(stats.wilcoxon(rounded[0], zero_method="pratt").pvalue)
    if signed.size <= COUNTED_PAIRS:
        counted = stats.permutation_test((signed,), _sum, permutation_type="samples", n_resamples=2**COUNTED_PAIRS)
        return correlation, float(counted.pvalue)
    return correlation, float(2 * stats.norm.sf(abs(correlation) / np.sqrt((signed**2).sum())))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return each p after Holm's step-down correction (1979, Scand. J. Stat. 6:65).

    Hypotheses without a p are not part of the family.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    tested = sorted((p, place) for place, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[place] = highest
    return adjusted


def compare(groups: Sequence[Sequence[float]], sign: int) -> Comparison | None:
    """Return the effect and the test of the patients' differences, one group per site; None if a site has no pair.

    Both give each site the same weight.
    """
    effect = stratified_interval(groups)
    if effect is None:
        return None
    correlation, p = signed_rank(groups)
    return Comparison(effect, p, correlation, sign)


def correct(family: Mapping[Key, Comparison | None]) -> dict[Key, Comparison]:
    """Return the comparisons of one table with p corrected for all of them."""
    known = {key: comparison for key, comparison in family.items() if comparison is not None}
    adjusted = holm([comparison.p for comparison in known.values()])
    return {key: replace(comparison, adjusted=p) for (key, comparison), p in zip(known.items(), adjusted, strict=True)}


def share(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Estimate | None:
    """Return the ratio of two mean gains over the same patients, a part to a whole; one group per site.

    The interval is that of the percentile bootstrap over patients, resampled within each site (Efron & Tibshirani
    1993, "An introduction to the bootstrap", chapters 8 and 13). None if a site has no patient or the whole is zero.
    """
    if not groups or not all(len(part) for part, _ in groups):
        return None
    pairs = [np.array(group, float) for group in groups]  # (2, patients) each
    whole = sum(float(pair[1].mean()) for pair in pairs)
    if not whole:
        return None
    ratio = sum(float(pair[0].mean()) for pair in pairs) / whole
    count = sum(pair.shape[1] for pair in pairs)
    if any(pair.shape[1] < 2 for pair in pairs):
        return Estimate(ratio, None, None, count)

    def statistic(*places: NDArray[np.intp], axis: int) -> NDArray[np.float64]:
        part, total = np.sum(
            [np.take(pair, chosen, axis=1).mean(axis=axis) for pair, chosen in zip(pairs, places, strict=True)], axis=0
        )
        return np.asarray(part / total)

    result = stats.bootstrap(
        [np.arange(pair.shape[1]) for pair in pairs],
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        random_state=np.random.default_rng(0),
    )
    return Estimate(ratio, float(result.confidence_interval.low), float(result.confidence_interval.high), count)


def _rounded(differences: Sequence[float]) -> NDArray[np.float64]:
    """Return the differences without rounding errors, so that equal ones share a rank."""
    return np.round(np.asarray(differences, float), 12)


def _sum(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return the sums without rounding errors, so that equally extreme ones count as equal."""
    return np.asarray(np.round(values.sum(axis=axis), 12))
